"""A nightly run against a plain loop over the same images: the same bits everywhere.

The loop reads with TensorFlow, encodes batch by batch, and compares all pairs in float64; of Kith it
uses what works on one image or one batch (decoding, preprocessing, the encoder, unit_float16).
"""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest

from index_builder.errors import ImageError
from index_builder.scoring.vectors import unit_float16
from tests.catalog_fixtures import Published, vectors_of
from tests.pipeline.small_catalogue import METADATA, load, write_config
from transforms.decoding import decode_image
from transforms.encoders.engines.choice import DEFAULT_CHOICE
from transforms.encoders.registry import load_encoder

K = 5


@dataclasses.dataclass(frozen=True)
class Direct:
    """What the loop found, images in the order of the catalogue.

    `alone` holds the vectors of the last images, each encoded in a batch of its own.
    """

    ids: list[str]
    metadata: list[dict[str, str | None]]
    vectors: np.ndarray
    alone: np.ndarray
    failed: dict[str, str]


@pytest.fixture(scope="module")
def snapshot(finished: Path) -> Published:
    return Published(finished)


@pytest.fixture(scope="module")
def direct(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Direct:
    import tensorflow as tf

    path = tmp_path_factory.mktemp("direct") / "c.yaml"
    spec = load(write_config(path, catalogue, path.parent / "w")).embed_spec(DEFAULT_CHOICE)
    encoder = load_encoder(spec.encoder, spec.batch_size)
    preprocessing = spec.preparation.preprocessing
    shards = []
    for file in sorted((catalogue / "catalog").iterdir()):
        records = []
        for record in tf.data.TFRecordDataset(str(file)):
            features = tf.train.Example.FromString(record.numpy()).features.feature
            text = {
                name: features[name].bytes_list.value[0].decode() for name in ("image_id", *METADATA)
            }
            records.append((text.pop("image_id"), text, features["image/encoded"].bytes_list.value[0]))
        shards.append(records)
    nothing = dict.fromkeys(METADATA)
    files = sorted((catalogue / "hard").iterdir())
    shards.append([(file.name, nothing, file.read_bytes()) for file in files])

    ids, metadata, vectors, failed = [], [], [], {}
    for records in shards:
        pixels = []
        for image_id, columns, data in records:
            try:
                image = decode_image(data, needed=preprocessing.needed_size)
            except ImageError as error:
                failed[image_id] = error.reason
                continue
            pixels.append(preprocessing.apply(image.pixels))
            ids.append(image_id)
            metadata.append(columns)
        for start in range(0, len(pixels), spec.batch_size):
            raw = encoder.encode(np.stack(pixels[start : start + spec.batch_size]))
            unit, valid = unit_float16(raw)
            assert valid.all()
            vectors.append(unit)
    alone = unit_float16(np.concatenate([encoder.encode(image[None]) for image in pixels[-4:]]))[0]
    return Direct(ids, metadata, np.concatenate(vectors), alone, failed)


@pytest.fixture(scope="module")
def ranked(direct: Direct, snapshot: Published) -> dict[str, list[tuple[str, np.float32]]]:
    """The K best of all pairs by float64 brute force over the transformed vectors."""
    trained = np.load(snapshot.folder("index") / "trained.npz")
    projected = (direct.vectors.astype(np.float64) - trained["mean"]) @ trained["matrix"].T
    codes = unit_float16(projected)[0].astype(np.float64)
    squared = (codes * codes).sum(axis=1)
    scores = (codes @ codes.T / np.sqrt(squared[:, None] * squared[None, :])).astype(np.float32)
    found = {}
    for i, query in enumerate(direct.ids):
        others = sorted((-scores[i, j], direct.ids[j].encode()) for j in range(len(codes)) if j != i)
        found[query] = [(name.decode(), -score) for score, name in others[:K]]
    return found


def test_embeddings_are_the_same_bytes(direct: Direct, snapshot: Published) -> None:
    table = snapshot.table("embeddings")
    assert table["image_id"].to_pylist() == direct.ids
    got = vectors_of(table)
    assert got.dtype == direct.vectors.dtype == np.float16
    assert got.tobytes() == direct.vectors.tobytes()
    for name in METADATA:
        assert table[name].to_pylist() == [columns[name] for columns in direct.metadata]


def test_the_rest_of_the_batch_does_not_matter(direct: Direct) -> None:
    one, other = direct.alone.astype(np.float64), direct.vectors[-4:].astype(np.float64)
    assert np.einsum("ij,ij->i", one, other).min() >= 0.99999


def test_failures_are_those_of_the_loop(direct: Direct, snapshot: Published) -> None:
    rows = snapshot.table("failures").to_pylist()
    assert {row["image_id"]: row["reason"] for row in rows} == direct.failed
    assert len(rows) == len(direct.failed)


def test_neighbours_and_score_bits_are_those_of_brute_force(
    direct: Direct, snapshot: Published, ranked: dict[str, list[tuple[str, np.float32]]]
) -> None:
    rows = snapshot.table("neighbors").to_pylist()
    assert sorted(row["query_id"] for row in rows) == sorted(direct.ids)
    for row in rows:
        wanted = ranked[row["query_id"]]
        assert row["neighbor_ids"] == [name for name, _ in wanted], row["query_id"]
        got = np.array(row["scores"], dtype=np.float32)
        assert got.tobytes() == np.array([score for _, score in wanted]).tobytes(), row["query_id"]
        assert row["status"] == "filled"


def test_the_jsonl_is_what_a_loop_writes(
    direct: Direct, snapshot: Published, ranked: dict[str, list[tuple[str, np.float32]]]
) -> None:
    names = {i: columns["name"] for i, columns in zip(direct.ids, direct.metadata, strict=True)}
    lines = set()
    for query, best in ranked.items():
        neighbors = [{"id": i, "score": float(f"{score:.9g}"), "name": names[i]} for i, score in best]
        row = {"query_id": query, "neighbors": neighbors}
        lines.add(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
    written = snapshot.jsonl().decode().splitlines()
    assert len(written) == len(lines)
    assert set(written) == lines


def test_plain_faiss_opens_the_shards_and_finds_the_same(
    snapshot: Published, ranked: dict[str, list[tuple[str, np.float32]]]
) -> None:
    folder, manifest = snapshot.folder("index"), snapshot.manifest("index")
    parts = [part for part in manifest.parts if part.name != "shared"]
    indexes = [faiss.read_index(str(folder / part.file(".faiss").path)) for part in parts]
    rows = snapshot.table("neighbors")
    ids = rows["query_id"].to_pylist()
    vectors = np.concatenate([_stored(index) for index in indexes])
    scores, labels = [], []
    for index in indexes:
        index.nprobe = index.nlist
        found, label = index.search(vectors, K + 1)
        scores.append(found)
        labels.append(label)
    merged, label = np.concatenate(scores, axis=1), np.concatenate(labels, axis=1)
    for i, query in enumerate(ids):
        own = label[i] != i
        order = np.argsort(-merged[i][own], kind="stable")[:K]
        wanted = np.array([score for _, score in ranked[query]])
        np.testing.assert_allclose(merged[i][own][order], wanted, atol=2e-6)
        known = {name for name, _ in ranked[query]}
        for place, score in zip(label[i][own][order], merged[i][own][order], strict=True):
            assert ids[place] in known or abs(score - wanted[-1]) <= 2e-6


def _stored(index: faiss.IndexIVF) -> np.ndarray:
    """The vectors of a shard in the order of its ids, which run through the whole index."""
    codes, ids = [], []
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            raw = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
            codes.append(raw.view(np.float16).reshape(size, index.d).astype(np.float32))
            ids.append(faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy())
    order = np.argsort(np.concatenate(ids))
    return np.concatenate(codes)[order]


def test_run_json_says_what_the_datasets_hold(
    direct: Direct, snapshot: Published, ranked: dict[str, list[tuple[str, np.float32]]]
) -> None:
    # The first run of the workspace is the one that made its datasets.
    run = json.loads(sorted((snapshot.workspace / "runs").glob("*/run.json"))[0].read_text())
    images = run["images"]
    assert images["read"] == len(direct.ids) + len(direct.failed)
    assert images["embedded"] == len(direct.ids) == snapshot.manifest("embeddings").rows
    assert images["failed_by_reason"] == dict(sorted(Counter(direct.failed.values()).items()))
    assert images["failed"] == len(direct.failed) == snapshot.manifest("failures").rows
    assert (images["reused"], images["unreadable_regions"]) == (0, 0)
    assert run["encoder"]["dim"] == direct.vectors.shape[1]

    trained = np.load(snapshot.folder("index") / "trained.npz")
    assert run["index"]["rows"] == len(direct.ids)
    assert run["index"]["shards"] == len(list(snapshot.folder("index").glob("*.faiss"))) == 3
    assert run["index"]["nlist"] == len(trained["centroids"])
    assert run["index"]["dim"] == trained["matrix"].shape[0] == 32
    pairs = len(direct.ids) * K
    assert run["join"]["queries"] == run["join"]["filled"] == len(direct.ids)
    assert run["join"]["pairs"] == run["export"]["pairs"] == pairs
    assert run["export"]["queries"] == len(direct.ids)
    assert all(Path(file).stat().st_size for file in run["export"]["files"])
    assert len(run["export"]["files"]) == 6

    truth = {i: c["object_id"] for i, c in zip(direct.ids, direct.metadata, strict=True)}
    together = Counter(value for value in truth.values() if value is not None)
    queries = [i for i, value in truth.items() if value is not None and together[value] > 1]
    first = sum(truth[ranked[i][0][0]] == truth[i] for i in queries)
    among = sum(any(truth[name] == truth[i] for name, _ in ranked[i]) for i in queries)
    assert run["truth"]["queries"] == len(queries) > 5
    assert run["truth"]["hit_rate_at_1"] == pytest.approx(first / len(queries))
    assert run["truth"]["hit_rate_at_k"] == pytest.approx(among / len(queries))
    assert run["recall"]["estimate"] == 1.0
    assert 0 < run["recall"]["lower_bound"] <= 1.0

    for kind, fingerprint in run["fingerprints"].items():
        assert snapshot.manifest(kind).fingerprint == fingerprint
    stages = {"embed": "embeddings", "build": "index", "join": "neighbors", "export": "recommendations"}
    for stage, kind in stages.items():
        entry, manifest = run["stages"][stage], snapshot.manifest(kind)
        assert (entry["rows"], entry["bytes"]) == (manifest.rows, manifest.bytes)
        assert (entry["content"], entry["state"]) == (manifest.content, "made")
        assert Path(entry["path"]) == snapshot.folder(kind)


def test_files_are_as_the_manifests_say(snapshot: Published) -> None:
    for kind in snapshot.pointer["datasets"]:
        folder, manifest = snapshot.folder(kind), snapshot.manifest(kind)
        listed = {"_manifest.json"}
        for part in manifest.parts:
            for file in part.files:
                content = (folder / file.path).read_bytes()
                assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
                listed.add(file.path)
        # Nothing else: no markers, no scratch, no unfinished writes.
        assert {path.name for path in folder.iterdir()} == listed, kind
    assert [path.name for path in snapshot.workspace.rglob(".writing-*")] == []
