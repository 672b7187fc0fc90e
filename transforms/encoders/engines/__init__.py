"""The engines that run an encoder's network: one module each, behind one interface."""
