"""The steps of building an index: check, train, assign part by part, plan the layout, write shards.

Each step is a function of a BuildSpec that leaves its result in files and finds there what an earlier,
interrupted attempt finished. A Beam pipeline calls them on many workers, `index_builder.library` in a
plain loop; the bytes are the same.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder import (
    assigned_parts,
    calibration,
    corpus_check,
    embeddings,
    manifests,
    shards,
    storage,
)
from index_builder.calibration import CalibrationSpec
from index_builder.corpus import Corpus
from index_builder.corpus_check import CorpusFigures, PartFindings
from index_builder.fingerprints import fingerprint
from index_builder.manifests import Manifest, Part
from index_builder.metadata_table import count_used
from index_builder.query_sample import QuerySample, choose_queries
from index_builder.sampling import evaluation_overlaps_training, read_sample
from index_builder.sharding import IndexLayout, load_layout, plan_layout, save_layout
from index_builder.spec import Goal, IndexSpec, ResolvedSpec
from index_builder.table_files import MetadataTable
from index_builder.training import TrainedIndex, load_trained, save_trained, train_index

# Raised when the same embeddings and configuration give other bytes than before.
REVISION = 2

# The marker of an nprobe that was chosen.
_CALIBRATED = "calibrated"
# The marker of a corpus that was found in order.
_CHECKED = "checked"

# What a step tells of its work: a counter's name and by how much it grew.
Tally = Callable[[str, int], None]


def no_tally(name: str, amount: int) -> None:
    """Forgets what a step tells of its work."""


@dataclasses.dataclass(frozen=True)
class Retry:
    """An index made again with more lists a query, since the recall of attempt - 1 was too low.

    What was trained is taken from the index in `folder`; `calibration` is what that one was chosen by.
    """

    attempt: int
    nprobe: int
    folder: str
    calibration: dict[str, Any] | None = None

    def fingerprint_value(self) -> dict[str, int]:
        """Returns what decides the bytes of the index."""
        return {"attempt": self.attempt, "nprobe": self.nprobe}


@dataclasses.dataclass(frozen=True)
class BuildSpec:
    """What is indexed, how, and where the index goes; travels to the workers.

    `key` is the fingerprint of the index that is being made; `metadata` the table whose columns it
    gets beside those of the images. With `calibration` nprobe is chosen on a sample of queries, with
    `retry` it is given.
    """

    embeddings_folder: str
    embeddings_parts: tuple[Part, ...]
    index: ResolvedSpec
    index_folder: str
    key: str
    metadata: MetadataTable | None = None
    calibration: CalibrationSpec | None = None
    retry: Retry | None = None

    @property
    def corpus(self) -> Corpus:
        """The embeddings with the columns of the table."""
        return Corpus(self.embeddings_folder, self.embeddings_parts, self.metadata)

    @property
    def calibration_sample(self) -> QuerySample:
        """The sample of queries that nprobe is chosen on."""
        assert self.calibration is not None, "asked for only where nprobe is calibrated"
        return self.calibration.sample(self.index.rows, self.index.request.seed)

    def work_path(self, name: str) -> str:
        """Returns the path of a scratch file."""
        return storage.join(self.index_folder, manifests.WORK_FOLDER, name)

    def assigned_path(self, number: int) -> str:
        """Returns the path of the scratch file of one part of the embeddings."""
        return self.work_path(f"assigned-{number:05d}-{self.key[:16]}.parquet")

    @property
    def trained_path(self) -> str:
        """The path of the trained transform and quantizer."""
        return storage.join(self.index_folder, shards.TRAINED_NAME)

    @property
    def layout_path(self) -> str:
        """The path of the layout of the rows."""
        return storage.join(self.index_folder, shards.LAYOUT_NAME)


def index_identity(
    source: Manifest,
    request: IndexSpec,
    table: MetadataTable | None,
    goal: Goal | None = None,
    calibration_spec: CalibrationSpec | None = None,
    retry: Retry | None = None,
) -> str:
    """Returns the fingerprint of the index that a request makes of an embeddings dataset.

    What the request leaves open is resolved first, so a goal counts by the choices that it leads to.
    """
    spec = request.resolve(source.rows, embeddings.load_dim(source), goal)
    value = {
        "kind": shards.KIND,
        "revision": REVISION,
        "embeddings": source.content,
        "spec": request.fingerprint_value(),
        "choices": spec.choices(),
    }
    if calibration_spec is not None:
        value["calibration"] = calibration_spec.fingerprint_value()
    if retry is not None:
        value["retry"] = retry.fingerprint_value()
    return fingerprint(value | _metadata_ingredient(table))


def _metadata_ingredient(table: MetadataTable | None) -> dict[str, object]:
    """Returns what a table adds to the fingerprint; an index without one keeps the one it had."""
    return {} if table is None else {"metadata": table.fingerprint_value()}


def check(spec: BuildSpec, number: int, tally: Tally = no_tally) -> PartFindings | None:
    """Checks one part of the embeddings; None where an earlier attempt found the corpus in order."""
    if manifests.finished_part(spec.index_folder, _CHECKED, spec.key) is not None:
        return None
    part = spec.embeddings_parts[number]
    tally("vectors_checked", part.rows)
    return corpus_check.check_part(
        spec.embeddings_folder, part, spec.index.encoder_dim, spec.index.request.metric
    )


def judge(spec: BuildSpec, findings: Iterable[PartFindings | None]) -> CorpusFigures:
    """Returns the figures of the corpus from the findings of its parts, and keeps them.

    Raises DatasetError, before any other work, for a corpus that cannot be indexed.
    """
    kept = manifests.finished_part(spec.index_folder, _CHECKED, spec.key)
    if kept is not None:
        return CorpusFigures(**kept.properties)
    found = [one for one in findings if one is not None]
    figures = corpus_check.judge_corpus(spec.embeddings_folder, spec.embeddings_parts, found)
    properties = dataclasses.asdict(figures)
    manifests.mark_part(spec.index_folder, Part(_CHECKED, spec.key, 0, (), properties))
    return figures


def train(spec: BuildSpec, tally: Tally = no_tally) -> str:
    """Trains unless an earlier attempt did; returns the path of the result.

    Raises DatasetError for a corpus that cannot be indexed; it is checked first if it was not yet.
    """
    name = "trained"
    if manifests.finished_part(spec.index_folder, name, spec.key) is None:
        numbers = range(len(spec.embeddings_parts))
        figures = judge(spec, (check(spec, number, tally) for number in numbers))
        rows = _learn(spec, figures, tally) if spec.retry is None else _take_over(spec, spec.retry)
        file = manifests.describe_file(spec.index_folder, shards.TRAINED_NAME)
        figures_of = {"training_rows": rows}
        manifests.mark_part(spec.index_folder, Part(name, spec.key, 0, (file,), figures_of))
    return spec.trained_path


def _learn(spec: BuildSpec, figures: CorpusFigures, tally: Tally) -> int:
    """Trains on a sample of the corpus; returns its rows."""
    sample = read_sample(
        spec.embeddings_folder, spec.embeddings_parts, spec.index.sample, spec.index.request.seed
    )
    save_trained(spec.trained_path, train_index(spec.index, sample, figures.largest_norm))
    tally("training_vectors", len(sample))
    return len(sample)


def _take_over(spec: BuildSpec, retry: Retry) -> int:
    """Copies what an earlier attempt was trained to; returns the rows that it was trained on."""
    earlier = shards.open_index(retry.folder)
    save_trained(spec.trained_path, earlier.trained)
    return int(earlier.manifest.properties["training_rows"])


def calibrates(spec: BuildSpec) -> bool:
    """Tells whether nprobe has to be chosen, and no earlier attempt did."""
    wanted = spec.calibration is not None and spec.retry is None
    return wanted and manifests.finished_part(spec.index_folder, _CALIBRATED, spec.key) is None


def draw_queries(spec: BuildSpec, number: int) -> pa.Table:
    """Returns what one part of the embeddings has for the sample that nprobe is chosen on."""
    assert spec.calibration is not None
    return calibration.draw_queries(spec.corpus, number, spec.calibration, spec.calibration_sample)


def search_part(spec: BuildSpec, number: int, queries: pa.Table, trained: TrainedIndex) -> pa.Table:
    """Finds the exact neighbours of the sample in one part of the embeddings."""
    assert spec.calibration is not None
    return calibration.search_part(spec.corpus, number, queries, spec.calibration, trained)


def choose_nprobe(spec: BuildSpec, queries: pa.Table, found: pa.Table, trained: TrainedIndex) -> None:
    """Chooses nprobe from the sample and its exact neighbours, and keeps it."""
    assert spec.calibration is not None
    figures = calibration.calibrate(
        spec.corpus, queries, found, spec.calibration, spec.calibration_sample, trained
    )
    manifests.mark_part(spec.index_folder, Part(_CALIBRATED, spec.key, 0, (), figures))


def calibrate(spec: BuildSpec, trained: TrainedIndex) -> None:
    """Chooses nprobe where that is asked for, in a plain loop over the parts."""
    if not calibrates(spec) or spec.calibration is None:
        return
    numbers = range(len(spec.embeddings_parts))
    queries = choose_queries((draw_queries(spec, n) for n in numbers), spec.calibration_sample)
    found = calibration.merge_found(
        (search_part(spec, n, queries, trained) for n in numbers), spec.corpus, spec.calibration
    )
    choose_nprobe(spec, queries, found, trained)


def settled_calibration(spec: BuildSpec) -> dict[str, Any] | None:
    """Returns the figures by which nprobe was chosen, or None where it was not."""
    if spec.retry is not None:
        return spec.retry.calibration
    if spec.calibration is None:
        return None
    part = manifests.finished_part(spec.index_folder, _CALIBRATED, spec.key)
    assert part is not None, "parts are assigned after calibration"
    return part.properties


def effective_nprobe(spec: BuildSpec, trained: TrainedIndex) -> int:
    """Returns nprobe as given or chosen, no more than the lists that training left."""
    wanted = spec.index.nprobe
    figures = settled_calibration(spec)
    if spec.retry is not None:
        wanted = spec.retry.nprobe
    elif figures is not None:
        wanted = int(figures["nprobe"])
    return min(wanted, trained.nlist)


def assign(
    spec: BuildSpec, number: int, trained: TrainedIndex, tally: Tally = no_tally
) -> NDArray[np.int64]:
    """Assigns one part of the embeddings to lists; returns their sizes, int64 [nlist]."""
    part, path = spec.embeddings_parts[number], spec.assigned_path(number)
    if not storage.exists(path):
        blocks = embeddings.read_part(spec.embeddings_folder, part)
        nprobe = effective_nprobe(spec, trained)
        assigned_parts.assign_part(blocks, trained, nprobe, path, spec.index.run_bytes)
        tally("vectors_in", part.rows)
    return assigned_parts.assigned_list_sizes(path, trained.nlist)


def plan(spec: BuildSpec, list_sizes: NDArray[np.int64]) -> IndexLayout:
    """Writes the layout, unless an earlier attempt finished with it, and returns it."""
    layout = plan_layout(list_sizes, spec.index.shards)
    if manifests.finished_part(spec.index_folder, shards.SHARED_PART, spec.key) is None:
        save_layout(spec.layout_path, layout)
    return layout


def build(spec: BuildSpec, shard: int, trained: TrainedIndex, tally: Tally = no_tally) -> Part:
    """Returns a shard's part, writing its files unless an earlier attempt did."""
    layout = load_layout(spec.layout_path)
    key = _shard_key(spec.key, layout, shard)
    part = manifests.finished_part(spec.index_folder, f"shard-{shard:05d}", key)
    if part is not None:
        return part
    paths = [spec.assigned_path(i) for i in range(len(spec.embeddings_parts))]
    part = shards.build_shard(spec.index_folder, shard, layout, trained, paths, key, spec.metadata)
    manifests.mark_part(spec.index_folder, part)
    tally("vectors_out", part.rows)
    tally("bytes_out", sum(file.bytes for file in part.files))
    if spec.metadata is not None:
        for name in ("metadata_matched", "metadata_unmatched"):
            tally(name, part.properties[name])
    return part


def _shard_key(identity: str, layout: IndexLayout, shard: int) -> str:
    return fingerprint({"index": identity, "rows": layout.shard_rows(shard)})


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
    folder, request = spec.index_folder, spec.index.request
    shared = manifests.collect_parts(folder, [shards.SHARED_PART], [spec.key])[0]
    layout = load_layout(spec.layout_path)
    numbers = range(layout.shards)
    names = [f"shard-{number:05d}" for number in numbers]
    keys = [_shard_key(spec.key, layout, number) for number in numbers]
    parts = manifests.collect_parts(folder, names, keys)
    path = storage.join(folder, parts[0].file(".parquet").path)
    with storage.open_binary(path) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    properties = {
        **shared.properties,
        "metric": request.metric.value,
        "method": spec.index.method.value,
        "encoding": spec.index.encoding,
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
            **_metadata_ingredient(spec.metadata),
        },
        schema,
        (shared, *parts),
        properties,
    )
