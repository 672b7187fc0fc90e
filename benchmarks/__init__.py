"""Benchmarks: what Kith's stages take, beside the bare limits of the same machine."""
