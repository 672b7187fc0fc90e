"""The steps of building an index: check, train, assign part by part, plan the layout, write shards.

Each step is a function of a BuildSpec that leaves its result in files and finds there what an earlier,
interrupted attempt finished. A Beam pipeline calls them on many workers, `index_builder.library` in a
plain loop; the bytes are the same. Between training and assigning nprobe is chosen (`nprobe_choice`);
what is said of the index in the end is in `index_manifest`.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Part
from index_builder.datasets.sampling import read_sample
from index_builder.index import assigned_parts, shards
from index_builder.index.sharding import IndexLayout, load_layout, plan_layout, save_layout
from index_builder.index.training import TrainedIndex, save_trained, train_index
from index_builder.steps import corpus_check
from index_builder.steps.build_spec import BuildSpec, Retry, Tally, no_tally, shard_key
from index_builder.steps.corpus_check import CorpusFigures, PartFindings
from index_builder.steps.nprobe_choice import effective_nprobe, effective_refine, settled_spec

# The marker of a corpus that was found in order.
_CHECKED = "checked"


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


def assign(
    spec: BuildSpec, number: int, trained: TrainedIndex, tally: Tally = no_tally
) -> NDArray[np.int64]:
    """Assigns one part of the embeddings to lists; returns their sizes, int64 [nlist]."""
    part, path = spec.embeddings_parts[number], spec.assigned_path(number)
    if not storage.exists(path):
        blocks = embeddings.read_part(spec.embeddings_folder, part)
        nprobe = effective_nprobe(spec, trained)
        run_bytes = settled_spec(spec, trained.nlist).run_bytes
        assigned_parts.assign_part(blocks, trained, nprobe, path, run_bytes)
        tally("vectors_in", part.rows)
    return assigned_parts.assigned_list_sizes(path, trained.nlist)


def plan(spec: BuildSpec, list_sizes: NDArray[np.int64]) -> IndexLayout:
    """Writes the layout, unless an earlier attempt finished with it, and returns it."""
    layout = plan_layout(list_sizes, settled_spec(spec, len(list_sizes)).shards)
    if manifests.finished_part(spec.index_folder, shards.SHARED_PART, spec.key) is None:
        save_layout(spec.layout_path, layout)
    return layout


def build(spec: BuildSpec, shard: int, trained: TrainedIndex, tally: Tally = no_tally) -> Part:
    """Returns a shard's part, writing its files unless an earlier attempt did."""
    layout = load_layout(spec.layout_path)
    key = shard_key(spec.key, layout, shard)
    part = manifests.finished_part(spec.index_folder, f"shard-{shard:05d}", key)
    if part is not None:
        return part
    paths = [spec.assigned_path(i) for i in range(len(spec.embeddings_parts))]
    part = shards.build_shard(
        spec.index_folder, shard, layout, trained, paths, key, spec.metadata,
        with_codes=effective_refine(spec) is not None,
    )  # fmt: skip
    manifests.mark_part(spec.index_folder, part)
    tally("vectors_out", part.rows)
    tally("bytes_out", sum(file.bytes for file in part.files))
    if spec.metadata is not None:
        for name in ("metadata_matched", "metadata_unmatched"):
            tally(name, part.properties[name])
    return part
