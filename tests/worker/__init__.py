"""Transforms on the pinned local runner: outputs, failures, counters."""
