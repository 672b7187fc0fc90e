"""The published snapshot: `current.json` points at the run whose datasets are in use."""

from typing import Any

from index_builder.datasets import storage
from index_builder.errors import DatasetError, KithError

SCHEMA_VERSION = 1
POINTER_NAME = "current.json"


def pointer_path(workspace: str) -> str:
    """Returns the path of the pointer."""
    return storage.join(workspace, POINTER_NAME)


def read_pointer(workspace: str) -> dict[str, Any] | None:
    """Returns the published snapshot, or None before the first one. Raises KithError if damaged."""
    path = pointer_path(workspace)
    try:
        pointer = storage.read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(pointer, dict) or pointer.get("schema_version") != SCHEMA_VERSION:
        raise KithError(
            f"{path} is no pointer of schema version {SCHEMA_VERSION}. Restore it, or delete it and "
            "publish a new run."
        )
    return pointer


def published_folder(workspace: str, kind: str) -> str | None:
    """Returns the folder of a dataset of the published snapshot, or None before the first one.

    Raises KithError where the snapshot has no such dataset.
    """
    pointer = read_pointer(workspace)
    if pointer is None:
        return None
    datasets = pointer.get("datasets")
    if not isinstance(datasets, dict) or kind not in datasets:
        raise KithError(
            f"{pointer_path(workspace)} names no dataset {kind!r}. Restore it, or delete it and "
            "publish a new run."
        )
    return storage.join(workspace, datasets[kind])


def require_published(workspace: str, kind: str) -> str:
    """Returns the folder of a published dataset. Raises DatasetError where nothing is published."""
    folder = published_folder(workspace, kind)
    if folder is None:
        raise DatasetError(
            f"Nothing is published in {workspace}: it has no {POINTER_NAME}. Run kith nightly first, "
            "or give the folder of a dataset."
        )
    return folder


def publish(workspace: str, run_id: str, datasets: dict[str, str]) -> str:
    """Points the workspace at a run, in one step; `datasets` maps kinds to full folders.

    Returns the path of the pointer, whose own paths are relative to the workspace.
    """
    path = pointer_path(workspace)
    base = workspace.rstrip("/") + "/"
    storage.swap_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "run": run_id,
            "run_path": f"runs/{run_id}",
            "datasets": {kind: folder.removeprefix(base) for kind, folder in datasets.items()},
        },
    )
    return path
