"""Checks before any work: the environment, the encoder's weights, the workspace."""

import importlib.metadata
import os
import platform
import sys
import tempfile

from index_builder.datasets import storage
from index_builder.datasets.table_files import find_table_files
from index_builder.errors import ConfigError, KithError
from index_builder.rules.exclusions import list_exclusion_files
from pipelines.config import Config
from transforms.encoders.registry import check_encoder

DISTRIBUTION = "kith-index"
PACKAGES = ("index_builder", "transforms", "pipelines")
SUPPORTED = ((3, 11), (3, 12))

# Distributions whose version can change the bytes of a result.
RECORDED = (
    "apache-beam",
    "faiss-cpu",
    "gcsfs",
    "keras",
    "numba",
    "numpy",
    "pillow",
    "pyarrow",
    "tensorflow",
    "tensorflow-io",
)


def check_environment() -> None:
    """Raises KithError for an unsupported Python or a package name that someone else owns."""
    if sys.version_info[:2] not in SUPPORTED:
        raise KithError(
            f"This is Python {platform.python_version()}, Kith needs 3.11 or 3.12 (tensorflow-io has "
            "no build for others). Make a virtual environment with one of them."
        )
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        others = sorted(set(owners.get(package, [])) - {DISTRIBUTION})
        if others:
            raise KithError(
                f"The package name {package!r} is also used by {', '.join(others)} in this "
                "environment, so one of the two would be imported in place of the other. Install "
                f"{DISTRIBUTION} into an environment of its own."
            )


def check_inputs(config: Config) -> None:
    """Raises ConfigError for a missing path, before any work; KithError for a glob without files.

    A metadata table is looked at too, and excluded pairs: their columns are known before the first
    image is embedded.
    """
    require_sources(config)
    for source in config.images.sources:
        source.find_files()
    table = config.table_spec()
    if table is not None:
        find_table_files(table)
    excluded = config.join.rules.exclude.spec()
    if excluded is not None:
        list_exclusion_files(excluded)
    check_workspace(config.workspace)
    check_encoder(config.encoder_spec())


def require_sources(config: Config) -> None:
    """Raises ConfigError when the configuration names no images."""
    if not config.images.sources:
        raise ConfigError(
            "images.sources: missing. Embedding needs at least one source of images; "
            "configs/local.yaml of the repository shows two. Of datasets that were made elsewhere name "
            "the folders: --embeddings, --index, --neighbors."
        )


def check_workspace(workspace: str) -> None:
    """Raises ConfigError when the workspace cannot be written to."""
    if storage.is_remote(workspace):
        return
    try:
        os.makedirs(workspace, exist_ok=True)
        # A file without a name, of which a kill leaves nothing.
        with tempfile.TemporaryFile(dir=workspace):
            pass
    except OSError as error:
        raise ConfigError(
            f"workspace: cannot write to {workspace}: {error.strerror}. Choose a folder that this "
            "user may write to."
        ) from error


def recorded_versions() -> dict[str, str]:
    """Returns the versions of what decides the bytes, for `run.json`."""
    versions = {"python": platform.python_version()}
    for name in RECORDED:
        versions[name] = importlib.metadata.version(name)
    return versions


def kith_version() -> str:
    """Returns the installed version of Kith."""
    return importlib.metadata.version(DISTRIBUTION)
