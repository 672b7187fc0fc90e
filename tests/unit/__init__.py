"""Tests of single modules: no pipeline runs here."""
