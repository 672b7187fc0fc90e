"""Tests of Kith: unit, pipeline and worker."""
