"""Stable hashes of plain values: what decides whether two datasets belong together."""

import hashlib
import json
from typing import Any


def fingerprint(value: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of the canonical JSON of a plain value.

    Keys are sorted, so equal values have equal fingerprints in every process and on every machine.
    Raises TypeError for a value that JSON cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def short(fingerprint_hex: str) -> str:
    """Returns the first 16 digits of a fingerprint: the name of a dataset's folder."""
    return fingerprint_hex[:16]
