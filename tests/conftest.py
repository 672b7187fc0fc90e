"""Fixtures that several test modules share, and what running them in several processes takes."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

import index_builder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Chooses the processes of `-n auto`: one a core that this process may use, and never more than 4.

    Each imports TensorFlow and takes up to 2 GiB.
    """
    return min(4, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Gives each process its own cache of compiled loops, kept until any source of a loop changes.

    numba names a loop in the index of its cache before the file with the code is whole, so a process
    that reads while another one writes can take the code of an older source or of other types. And it
    looks at a loop's own file only, not at those of what the loop calls.
    """
    cache = getattr(config, "cache", None)
    if cache is None:
        return
    digest = hashlib.sha256()
    for path in sorted(Path(index_builder.__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        if b"numba" in source:
            digest.update(source)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    folder = cache.mkdir(f"numba-{worker}")
    for old in folder.iterdir():
        if old.name != digest.hexdigest():
            shutil.rmtree(old)
    os.environ["NUMBA_CACHE_DIR"] = str(folder / digest.hexdigest())


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
