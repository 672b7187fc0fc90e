"""Fixtures that several test modules share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small catalogue: 60 images in 3 TFRecord shards, and the hard files."""
    from tests.pipeline.small_catalogue import write_catalogue

    return write_catalogue(tmp_path_factory.mktemp("catalogue") / "data")


@pytest.fixture(scope="session")
def finished(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after one undisturbed nightly run on the small catalogue."""
    from pipelines.nightly import run_nightly
    from tests.pipeline.small_catalogue import load, session, write_config

    folder = tmp_path_factory.mktemp("finished")
    run_nightly(load(write_config(folder / "c.yaml", catalogue, folder / "w")), session())
    return folder / "w"
