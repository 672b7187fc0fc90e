"""Where images come from: one module a container format, one interface for all."""
