"""What the embed stage takes over from an earlier dataset: whole parts, and single vectors."""

import dataclasses
import os

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.content_index import build_content_index, content_index_name
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import ConfigError, FingerprintError, KithError
from pipelines.embed_plan import EmbedConfig, EmbedPlan
from pipelines.publish import published_folder
from pipelines.stage import FOLDERS
from transforms import failures
from transforms.reuse import ReuseSpec


@dataclasses.dataclass(frozen=True)
class Earlier:
    """An earlier embeddings dataset of the workspace, and the failures beside it."""

    folder: str
    failures_folder: str
    made: Manifest
    failed: Manifest


def open_published(workspace: str) -> Earlier | None:
    """Returns the published datasets, or None before the first publication."""
    folder = published_folder(workspace, embeddings.KIND)
    failures_folder = published_folder(workspace, failures.KIND)
    if folder is None or failures_folder is None:
        return None
    return Earlier(
        folder,
        failures_folder,
        manifests.load(folder, embeddings.KIND),
        manifests.load(failures_folder, failures.KIND),
    )


def open_for_replay(workspace: str, folder: str, plan: EmbedPlan) -> Earlier:
    """Opens the dataset whose failures are to be tried again.

    Raises ConfigError for a dataset of another workspace or a policy that refuses more than it did,
    FingerprintError for one of another encoder.
    """
    folder = folder if storage.is_remote(folder) else os.path.abspath(folder)
    parent, name = storage.join(folder, "..").rstrip("/"), folder.rstrip("/").rsplit("/", 1)[-1]
    if parent != storage.join(workspace, FOLDERS[embeddings.KIND]):
        raise ConfigError(
            f"--replay got {folder}, wanted an embeddings dataset of the workspace {workspace}: the "
            "new dataset shares its files. Give one of its folders embeddings/..., or set workspace."
        )
    made = manifests.load(folder, embeddings.KIND)
    failures_folder = storage.join(workspace, FOLDERS[failures.KIND], name)
    failed = manifests.load(failures_folder, failures.KIND)
    differing = differences(made.properties["encoder"], plan.encoder)
    if differing:
        raise FingerprintError(
            f"--replay got {folder}, which was made with another encoder ({differing}); vectors of two "
            "encoders are never mixed. Use the configuration of that dataset, or run kith embed "
            "without --replay."
        )
    before, now = made.properties["admission"], plan.graph.spec.preparation.policy.admission()
    if _refuses_more(before, now):
        raise ConfigError(
            f"--replay got {folder}, which was made with {before}, and the configuration has {now}, "
            "which refuses more: images of the dataset would have to go. Run kith embed without "
            "--replay."
        )
    return Earlier(folder, failures_folder, made, failed)


def differences(found: dict[str, object], wanted: dict[str, object]) -> str:
    """Says in which entries two encoder fingerprints differ; empty where they are equal."""
    return "; ".join(
        f"{key}: the dataset has {found.get(key)!r}, the configuration {wanted.get(key)!r}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    )


def _refuses_more(before: dict[str, object], now: dict[str, object]) -> bool:
    fewer = int(str(now["max_pixels"])) < int(str(before["max_pixels"]))
    return fewer or _refuses_by_content(before, now)


def _refuses_by_content(before: dict[str, object], now: dict[str, object]) -> bool:
    """Whether pictures that were taken would be refused for more than their size, which rows state."""
    stricter = (before["truncated"], now["truncated"]) == ("accept", "fail")
    # Datasets from before there was a number have none.
    return stricter or int(str(before.get("rules", 1))) < int(str(now["rules"]))


def carry_over_unchanged(earlier: Earlier, graph: EmbedConfig) -> set[str]:
    """Marks parts of the earlier datasets with an equal key as finished; returns their names."""
    by_key = {part.key: part for part in earlier.made.parts}
    failed_by_key = {part.key: part for part in earlier.failed.parts}
    names = set()
    for task in graph.tasks:
        part, failed = by_key.get(task.key), failed_by_key.get(task.key)
        if part is not None and failed is not None and _is_intact(earlier, part, failed):
            _carry_over(earlier, graph, part, failed, task.part, task.key)
            names.add(task.part)
    return names


def carry_over_for_replay(earlier: Earlier, graph: EmbedConfig) -> set[str]:
    """Marks the parts in which nothing failed as finished; returns their names.

    Raises KithError when the catalogue is not the one that the datasets were made of.
    """
    failed_by_name = {part.name: part for part in earlier.failed.parts}
    by_shard = {
        (part.properties["source_shard"], part.properties["token"]): part for part in earlier.made.parts
    }
    names = set()
    for task in graph.tasks:
        part = by_shard.get((task.shard.name, task.shard.token))
        if part is None or len(by_shard) != len(graph.tasks):
            raise KithError(
                f"--replay got {earlier.folder}, but the catalogue has changed since it was made "
                f"({task.shard.name} is new or has other content, or shards are gone). Run kith embed "
                "without --replay: it encodes only what is new."
            )
        failed = failed_by_name[part.name]
        nothing_failed = not part.properties["images_failed"]
        if nothing_failed and _is_intact(earlier, part, failed):
            _carry_over(earlier, graph, part, failed, task.part, task.key)
            names.add(task.part)
    return names


def _is_intact(earlier: Earlier, part: Part, failed: Part) -> bool:
    return manifests.is_intact(earlier.folder, part) and manifests.is_intact(
        earlier.failures_folder, failed
    )


def _carry_over(
    earlier: Earlier, graph: EmbedConfig, part: Part, failed: Part, name: str, key: str
) -> None:
    """Marks both parts as finished in the new datasets, where they lie."""
    for old, target, found in (
        (earlier.failures_folder, graph.failures_folder, failed),
        (earlier.folder, graph.embeddings_folder, part),
    ):
        moved = manifests.relocate(found, old, target)
        manifests.mark_part(target, dataclasses.replace(moved, name=name, key=key))


def index_vectors(earlier: Earlier, plan: EmbedPlan) -> ReuseSpec | None:
    """Makes the earlier dataset's vectors available by the content of their pictures.

    Returns None where they cannot be taken over: they are of another encoder, or images that are
    refused tonight, truncated or damaged ones, may be among them.
    """
    if fingerprint(earlier.made.properties["encoder"]) != fingerprint(plan.encoder):
        return None
    policy = plan.graph.spec.preparation.policy
    if _refuses_by_content(earlier.made.properties["admission"], policy.admission()):
        return None
    path = storage.join(
        plan.graph.embeddings_folder, manifests.WORK_FOLDER, content_index_name(earlier.made)
    )
    if not storage.exists(path):
        build_content_index(earlier.folder, earlier.made.parts, path)
    return ReuseSpec(earlier.folder, path)
