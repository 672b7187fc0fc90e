"""Whole runs on small catalogues."""
