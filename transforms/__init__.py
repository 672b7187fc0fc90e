"""Beam wiring, and the functions that work on one image or one block."""
