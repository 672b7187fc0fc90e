"""The library's plain loop: interrupted, repeated, refused, and with a recall to reach."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder import library
from index_builder.datasets import manifests
from index_builder.datasets.embeddings import EmbeddingSchema
from index_builder.datasets.manifests import Manifest
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.index.kmeans import find_centroids
from index_builder.index.shards import open_index
from index_builder.library import Goal, IndexSpec, JoinSpec, Metric, Promise, TransformSpec
from index_builder.rules.rules import JoinRules
from index_builder.steps import building, index_manifest, joining, queries
from index_builder.steps.importing import import_arrays

DIM = 16
SPEC = IndexSpec(nlist=8, nprobe=4, shards=3)


def clustered(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(12, DIM))
    return (centres[rng.integers(12, size=rows)] + 0.6 * rng.normal(size=(rows, DIM))).astype(
        np.float32
    )


def write(folder: Path, rows: int, seed: int = 0, **options: Any) -> str:
    ids = [f"{seed}-{row}" for row in range(rows)]
    return import_arrays(clustered(rows, seed), ids, str(folder), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Killed(Exception):
    """Raised where a run is to end."""


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN])
def test_threads_do_not_change_a_byte(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index_builder.steps.importing._PART_BYTES", 1)
    monkeypatch.setattr("index_builder.steps.importing.ROW_GROUP_ROWS", 100)
    corpus = write(tmp_path / "corpus", 700, normalize=metric is Metric.COSINE)
    spec = IndexSpec(metric, nlist=8, nprobe=4, shards=3)
    available = sorted(os.sched_getaffinity(0))
    seen: dict[str, set[int]] = {}

    def watch(name: str) -> None:
        original = getattr(building, name)

        def watched(*arguments: Any) -> Any:
            seen.setdefault(name, set()).add(threading.get_ident())
            return original(*arguments)

        monkeypatch.setattr(building, name, watched)

    watch("assign")
    watch("build")
    for cores in (1, 2, 5):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: (available * n)[:n])
        seen.clear()
        library.build(corpus, str(tmp_path / str(cores)), spec)
        assert contents(tmp_path / str(cores)) == contents(tmp_path / "1")
        own = {threading.get_ident()}
        assert all((found == own) == (cores == 1) for found in seen.values())


def test_threads_keep_to_the_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index_builder.steps.importing._PART_BYTES", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    corpus = write(tmp_path / "corpus", 300)
    # A step takes 16 MiB beside its data: two fit, and no third.
    goal = Goal(memory_limit_bytes=40 << 20)
    taken = []
    original = library.map_in_order

    def watched(work: Any, items: Any, threads: int) -> Any:
        taken.append(threads)
        return original(work, items, threads)

    monkeypatch.setattr(library, "map_in_order", watched)
    library.build(corpus, str(tmp_path / "index"), SPEC, goal)
    library.build(corpus, str(tmp_path / "more"), SPEC)
    assert taken[0] == 2
    assert taken[2:] == [16, 16]


@pytest.mark.parametrize(
    ("module", "step", "folder"),
    [
        (building, "assign", "index"),
        (building, "build", "index"),
        (index_manifest, "describe_shared", "index"),
        (queries, "assign", "queries"),
        (queries, "build", "queries"),
        (joining, "join_part", "neighbors"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    module: Any, step: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "query_shards", lambda *_: 2)
    monkeypatch.setattr("index_builder.steps.importing._PART_BYTES", 1)
    monkeypatch.setattr("index_builder.steps.importing.ROW_GROUP_ROWS", 100)
    corpus, asked = write(tmp_path / "corpus", 300), write(tmp_path / "asked", 150, seed=1)

    def run(target: Path) -> None:
        index, made = str(target / "index"), str(target / "queries")
        library.build(corpus, index, SPEC)
        library.make_queries(asked, index, made)
        library.join(index, str(target / "neighbors"), JoinSpec(4), queries_folder=made)

    run(tmp_path / "straight")
    done, original = [0], getattr(module, step)

    def failing(*arguments: Any, **options: Any) -> Any:
        done[0] += 1
        if done[0] == 2 or step == "describe_shared":
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, failing)
        with pytest.raises(Killed):
            run(tmp_path / "halting")
    assert not manifests.is_complete(str(tmp_path / "halting" / folder))
    run(tmp_path / "halting")
    found, wanted = (contents(tmp_path / name) for name in ("halting", "straight"))
    assert found == wanted


def test_running_again_changes_nothing_and_nothing_is_overwritten(tmp_path: Path) -> None:
    corpus, index = write(tmp_path / "corpus", 200), str(tmp_path / "index")
    library.build(corpus, index, SPEC)
    before = {path: path.stat().st_mtime_ns for path in Path(index).iterdir()}
    assert library.build(corpus, index, SPEC) == index
    assert {path: path.stat().st_mtime_ns for path in Path(index).iterdir()} == before
    with pytest.raises(DatasetError, match="index holds another dataset"):
        library.build(corpus, index, IndexSpec(nlist=3))
    assert {path: path.stat().st_mtime_ns for path in Path(index).iterdir()} == before


def same_ids(folder: Path) -> None:
    source = manifests.load(str(folder), "embeddings")
    doubled = Manifest(
        source.kind, source.fingerprint, source.fingerprints, source.schema,
        (*source.parts, *source.parts), source.properties,
    )  # fmt: skip
    manifests.commit(str(folder), doubled)


def lose_a_part(folder: Path) -> None:
    (folder / "part-00000.parquet").unlink()


def become_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    schema = EmbeddingSchema(DIM).arrow()
    pq.write_table(pa.Table.from_pylist([], schema), folder / "part-00000.parquet")
    file = manifests.describe_file(str(folder), "part-00000.parquet")
    part = manifests.Part("part-00000", "key", 0, (file,))
    manifests.commit(
        str(folder), Manifest("embeddings", "f", {}, [], (part,), {"dim": DIM, "encoder": {}})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (same_ids, "100 image ids occur more than once"),
        (lose_a_part, r"1 of its files .*: part-00000\.parquet is missing"),
        (become_empty, "holds 0 embeddings, wanted at least one"),
    ],
)
def test_embeddings_that_cannot_be_indexed(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    corpus = Path(write(tmp_path / "corpus", 100))
    damage(corpus)
    with pytest.raises(DatasetError, match=message):
        library.build(str(corpus), str(tmp_path / "index"), SPEC)
    assert not (tmp_path / "index").exists()


def test_an_index_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    corpus, index = write(tmp_path / "corpus", 100), str(tmp_path / "index")
    with pytest.raises(ConfigError, match="index.nprobe is 9, but the index has 4 lists"):
        library.build(corpus, index, IndexSpec(nlist=4, nprobe=9))
    with pytest.raises(ConfigError, match="memory"):
        library.build(corpus, index, SPEC, Goal(memory_limit_bytes=1000))
    with pytest.raises(ConfigError, match="join.rules.same: there is no column 'colour'"):
        library.build(corpus, index, SPEC, rules=JoinRules(same=("colour",)))
    assert not (tmp_path / "index").exists()


def test_an_index_tells_of_uneven_lists_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No vector with positive numbers alone is nearest to the opposite of one.
    def with_opposites(*arguments: Any, **settings: Any) -> np.ndarray[Any, Any]:
        found = find_centroids(*arguments, **settings)
        return np.concatenate([found, -found])

    monkeypatch.setattr("index_builder.index.training.find_centroids", with_opposites)
    # Most rows are close to one direction: a few lists have nearly all of them.
    vectors = np.abs(clustered(2000))
    vectors[:1500] = vectors[0] + 0.05 * vectors[:1500]
    corpus = import_arrays(vectors, [str(row) for row in range(2000)], str(tmp_path / "corpus"))
    index = open_index(library.build(corpus, str(tmp_path / "index"), SPEC))
    sizes, told = np.diff(index.layout.list_offsets), index.manifest.properties
    assert told["empty_lists"] == (sizes == 0).sum() >= 8
    assert told["imbalance"] == pytest.approx(len(sizes) * (sizes**2).sum() / 2000**2, abs=1e-6)
    assert told["imbalance"] > 2
    rows = np.diff(index.layout.shard_offsets)
    assert told["largest_shard_over_mean"] == pytest.approx(rows.max() / rows.mean(), abs=1e-6)
    assert told["largest_shard_over_mean"] <= 1.2


def test_nprobe_is_chosen_for_a_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So small an index would be searched whole.
    monkeypatch.setattr("index_builder.index.spec.LEAST_GAIN_OF_LISTS", 0)
    brands = {"brand": [f"b{row % 3}" for row in range(1500)]}
    corpus, index = write(tmp_path / "corpus", 1500, columns=brands), str(tmp_path / "index")
    goal = Goal(k=5, min_recall=0.9)
    library.build(corpus, index, IndexSpec(nlist=30, shards=2), goal)
    made = manifests.load(index, "index").properties
    assert made["nprobe"] < made["nlist"] == 30
    spec = JoinSpec(5)
    found = library.join(index, str(tmp_path / "n"), spec)
    certificate = library.evaluate(index, found, spec, Promise(0.9))
    assert (certificate.k, certificate.nprobe, certificate.rows) == (5, made["nprobe"], 1500)
    assert certificate.estimate >= certificate.lower_bound >= 0.9
    more = library.evaluate(index, found, spec, Promise(0.9), embeddings_folder=corpus, by="brand")
    assert more.estimate == certificate.estimate
    assert more.encoder_recall == pytest.approx(certificate.estimate, abs=0.05)
    assert more.encoder_queries == 250
    assert sum(value.rows for value in more.values) == 1500
    with pytest.raises(ConfigError, match="by: got 'shoe', wanted a column of .*: image_id, item_id"):
        library.evaluate(index, found, spec, by="shoe")
    other = write(tmp_path / "other", 200)
    with pytest.raises(FingerprintError, match=r"other has content .*, but .* was made of .*Give the"):
        library.evaluate(index, found, spec, embeddings_folder=other)
    with pytest.raises(FingerprintError, match="is not the join of .* with itself under this spec"):
        library.evaluate(index, found, JoinSpec(6))


def test_queries_longer_than_the_index_s_scale_are_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", 200, normalize=False)
    index = library.build(
        corpus, str(tmp_path / "index"), IndexSpec(metric=Metric.EUCLIDEAN, nlist=4, nprobe=4)
    )
    asked = write(tmp_path / "asked", 40, seed=2, normalize=False)
    made = library.make_queries(asked, index, str(tmp_path / "q"))
    found = library.read_neighbors(
        library.join(index, str(tmp_path / "n"), JoinSpec(3), queries_folder=made)
    )
    distances = ((clustered(40, 2)[:, None, :] - clustered(200)[None, :, :]) ** 2).sum(axis=2)
    wanted = np.sort(distances, axis=1)[:, :3]
    by_id = dict(zip(found["query_id"].to_pylist(), found["scores"].to_pylist(), strict=True))
    scores = np.asarray([by_id[f"2-{row}"] for row in range(40)])
    # Rounding to float16 moves a distance by about a thousandth.
    assert np.abs(-scores - wanted).max() < 0.01 * wanted.max()
    long = import_arrays(100 * clustered(5), list("abcde"), str(tmp_path / "long"), normalize=False)
    with pytest.raises(DatasetError, match="longer"):
        library.make_queries(long, index, str(tmp_path / "long-q"))
    unit = write(tmp_path / "unit", 40, seed=2)
    with pytest.raises(FingerprintError, match="normalize: the queries have True, the index False"):
        library.make_queries(unit, index, str(tmp_path / "unit-q"))


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (IndexSpec, {"nlist": 0}, "IndexSpec.nlist is 0, wanted at least 1"),
        (IndexSpec, {"nprobe": 0}, "IndexSpec.nprobe is 0, wanted at least 1"),
        (IndexSpec, {"shards": -1}, "IndexSpec.shards is -1, wanted at least 1"),
        (IndexSpec, {"training_rows": 0}, "IndexSpec.training_rows is 0, wanted at least 1"),
        (IndexSpec, {"seed": -1}, "IndexSpec.seed is -1, wanted at least 0"),
        (IndexSpec, {"metric": "euclidean"}, "'euclidean', wanted a Metric"),
        (TransformSpec, {"kind": "PCA"}, "'PCA', wanted one of none, pca"),
        (TransformSpec, {"kind": "pca", "dim": 0}, "TransformSpec.dim is 0, wanted at least 1"),
        (Goal, {"k": 0}, "Goal.k is 0, wanted at least 1"),
        (Goal, {"min_recall": 1.5}, "Goal.min_recall is 1.5, wanted 0 to 1"),
        (Goal, {"memory_limit_bytes": 0}, "Goal.memory_limit_bytes is 0, wanted at least 1"),
        (JoinSpec, {"k": 0}, "k is 0, wanted at least 1"),
        (JoinSpec, {"k": 1, "threads": 0}, "threads is 0, wanted at least 1"),
        (JoinSpec, {"k": 1, "max_probe": -1}, "max_probe is -1, wanted at least 0"),
        (Promise, {"target": 1.5}, "Promise.target is 1.5, wanted 0 to 1"),
        (Promise, {"sample": 0}, "Promise.sample is 0, wanted at least 1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_when_it_is_made(
    made: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        made(**options)


def test_vectors_without_numbers_are_not_imported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"float32 \[3, 0\], wanted floats \[n, dim\]"):
        import_arrays(np.empty((3, 0), np.float32), ["a", "b", "c"], str(tmp_path / "e"))
    assert not (tmp_path / "e").exists()
