"""Tests that run for as long as one likes; only `make torture` collects them."""
