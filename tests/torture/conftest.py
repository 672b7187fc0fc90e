"""Leaves these tests out of every collection that does not name their folder."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = any("torture" in argument for argument in config.args)
    return None if named else True
