"""`kith check`: what can be known to be wrong before any work, or of published data."""

from typing import Any

from index_builder.datasets import manifests, storage
from pipelines.config import Config
from pipelines.embed_plan import list_shards
from pipelines.preflight import check_environment, check_inputs, kith_version
from pipelines.publish import read_pointer


def check_everything(config: Config, data: bool) -> dict[str, Any]:
    """Checks environment, configuration and paths; with `data` also every published file.

    Raises ConfigError or KithError with the first problem.
    """
    check_environment()
    check_inputs(config)
    shards = list_shards(config)
    pointer = read_pointer(config.workspace)
    result: dict[str, Any] = {
        "kith_version": kith_version(),
        "workspace": config.workspace,
        "image_shards": len(shards),
        "encoder": config.encoder.name,
        "published_run": None if pointer is None else pointer["run"],
    }
    if data:
        result["verified_files"] = 0 if pointer is None else _verify(config.workspace, pointer)
    return result


def _verify(workspace: str, pointer: dict[str, Any]) -> int:
    """Checks the checksums of all files of the published snapshot; returns how many there are."""
    count = 0
    for kind, path in pointer["datasets"].items():
        folder = storage.join(workspace, path)
        for part in manifests.load(folder, kind).parts:
            for file in part.files:
                manifests.verify_file(folder, file)
                count += 1
    return count
