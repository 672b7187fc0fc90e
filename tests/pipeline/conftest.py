"""What the whole-run tests of one process share."""

import functools

import pytest

from transforms import embed
from transforms.encoders.registry import load_encoder

# Loading and compiling the network takes longer than embedding a small catalogue with it.
_load_once = functools.cache(load_encoder)


@pytest.fixture(autouse=True)
def kept_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets runs in this process share a loaded encoder, by its whole specification."""
    monkeypatch.setattr(embed, "load_encoder", _load_once)
