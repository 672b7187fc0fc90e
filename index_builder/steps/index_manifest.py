"""What is said of a finished index: the part that its shards share, and its manifest."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.metadata_table import count_used
from index_builder.datasets.sampling import evaluation_overlaps_training
from index_builder.index import assigned_parts, shards
from index_builder.index.goals import Encoding, Method
from index_builder.index.sharding import load_layout
from index_builder.index.training import TrainedIndex, load_trained
from index_builder.steps.build_spec import REVISION, BuildSpec, metadata_ingredient, shard_key
from index_builder.steps.nprobe_choice import effective_nprobe, effective_refine, settled_calibration


def describe_shared(list_sizes: NDArray[np.int64], spec: BuildSpec, built: Iterable[Part]) -> Part:
    """Returns the part of what all shards share, once all shards are built."""
    trained = load_trained(spec.trained_path)
    files = tuple(
        manifests.describe_file(spec.index_folder, name)
        for name in (shards.TRAINED_NAME, shards.LAYOUT_NAME)
    )
    built = list(built)
    rows = [part.rows for part in built]
    properties: dict[str, Any] = {
        "nlist": trained.nlist,
        "nprobe": effective_nprobe(spec, trained),
        "calibration": settled_calibration(spec),
        "attempt": 1 if spec.retry is None else spec.retry.attempt,
        "dim": trained.dim,
        "shards": len(rows),
        "empty_lists": int((list_sizes == 0).sum()),
        # Sum of squares over the even split: 1 when all lists are equal (FAISS's imbalance factor).
        "imbalance": round(
            float(trained.nlist * np.square(list_sizes, dtype=np.float64).sum())
            / float(list_sizes.sum()) ** 2,
            6,
        ),
        "largest_shard_over_mean": round(max(rows) * len(rows) / sum(rows), 6),
        "scale_exponent": trained.transform.scale_exponent,
        "worst_relative_rounding": _worst_rounding(spec, trained),
        "training_rows": _training_rows(spec),
        "evaluation_overlaps_training": evaluation_overlaps_training(spec.index.rows),
    }
    if spec.metadata is not None:
        properties["metadata"] = _describe_metadata(spec, built)
    part = Part(shards.SHARED_PART, spec.key, 0, files, properties)
    manifests.mark_part(spec.index_folder, part)
    return part


def _worst_rounding(spec: BuildSpec, trained: TrainedIndex) -> float | None:
    """Returns the largest relative error of a row (vectors.relative_rounding); None under cosine."""
    if not trained.metric.is_scaled:
        return None
    numbers = range(len(spec.embeddings_parts))
    worst = max(assigned_parts.assigned_rounding(spec.assigned_path(number)) for number in numbers)
    return float(f"{worst:.6g}")


def _training_rows(spec: BuildSpec) -> int:
    trained = manifests.finished_part(spec.index_folder, "trained", spec.key)
    assert trained is not None, "shards are built after training"
    return int(trained.properties["training_rows"])


def _describe_metadata(spec: BuildSpec, built: list[Part]) -> dict[str, int]:
    """Returns the figures of the join with the metadata table: of the index, then of the table.

    An item's images may be in several shards, so the table's rows that were used are a union.
    """
    used: list[NDArray[np.int64]] = []
    table_rows = 0
    for part in built:
        path = shards.table_rows_path(spec.index_folder, part.name, part.key)
        with storage.open_binary(path) as file:
            taken = np.load(file)
            used.append(taken["used"])
            table_rows = int(taken["table_rows"])
    return {
        "matched": sum(part.properties["metadata_matched"] for part in built),
        "unmatched": sum(part.properties["metadata_unmatched"] for part in built),
        "table_rows": table_rows,
        "ignored": table_rows - count_used(used, table_rows),
    }


def index_manifest(spec: BuildSpec, source: Manifest) -> Manifest:
    """Returns the manifest of a finished index. Raises DatasetError where a part is missing."""
    folder, request, refine = spec.index_folder, spec.index.request, effective_refine(spec)
    shared = manifests.collect_parts(folder, [shards.SHARED_PART], [spec.key])[0]
    layout = load_layout(spec.layout_path)
    numbers = range(layout.shards)
    names = [f"shard-{number:05d}" for number in numbers]
    keys = [shard_key(spec.key, layout, number) for number in numbers]
    parts = manifests.collect_parts(folder, names, keys)
    path = storage.join(folder, parts[0].file(".parquet").path)
    with storage.open_arrow(path) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    properties = {
        **shared.properties,
        "metric": request.metric.value,
        "method": (spec.index.method if refine is None else Method.COMPRESSED).value,
        "encoding": (Encoding.FLOAT16 if refine is None else Encoding.COMPRESSED).value,
        "refine": refine,
        "encoder_dim": spec.index.encoder_dim,
        "encoder": source.properties.get("encoder", {}),
        "seed": request.seed,
        "embeddings": source.content,
    }
    return Manifest(
        shards.KIND,
        spec.key,
        {
            "code": {"build": REVISION},
            "config": request.fingerprint_value(),
            "inputs": source.content,
            **metadata_ingredient(spec.metadata),
        },
        schema,
        (shared, *parts),
        properties,
    )
