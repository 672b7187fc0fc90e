"""Embeddings that keep their lengths, and the metrics for which lengths count, through all stages."""

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Manifest
from index_builder.errors import DatasetError, FingerprintError
from index_builder.index.shards import open_index
from pipelines.build_index import build_index
from pipelines.embed_images import Embedded, embed_images
from pipelines.join_neighbors import join_neighbors
from pipelines.nightly import run_nightly
from pipelines.search_images import search_images
from tests.catalog_fixtures import Published, read_dataset, vectors_of
from tests.pipeline.small_catalogue import load, session, write_config
from tests.unit.images_for_tests import encode, picture
from transforms.encoders.keras_runtime import import_keras

IMAGES, DIM, K = 20, 16, 5
RAW = "embeddings.normalize=false"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keras = import_keras()
    keras.utils.set_random_seed(7)
    network = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(DIM, 8, strides=8)])
    path = tmp_path_factory.mktemp("metrics") / "model.keras"
    network.save(path)
    return path


class Workspace:
    """A folder of pictures in shards of twelve, and the workspace of their runs."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.photos = folder / "photos"
        self.photos.mkdir()
        for number in range(IMAGES):
            self.add(f"photo-{number:02d}.png", number)
        self.settings: dict[str, Any] = {
            "images": {
                "sources": [{"format": "files", "paths": f"{self.photos}/*", "files_per_shard": 12}]
            },
            "encoder": {
                "name": "custom", "weights": str(model), "preprocessing": "tf",
                "input_size": [32, 32], "batch_size": 4, "engine": "tensorflow",
            },
            "index": {"nlist": 4, "nprobe": 4, "shards": 2},
            "join": {"k": K},
            "evaluate": {},
            "export": {},
        }  # fmt: skip
        self.config = write_config(folder / "c.yaml", self.photos, folder / "w", **self.settings)

    def add(self, name: str, number: int) -> None:
        (self.photos / name).write_bytes(encode(picture(40, 50, number), "PNG"))

    def embed(self, *overrides: str, replay: str | None = None) -> Embedded:
        return embed_images(load(self.config, *overrides), session(), replay)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Workspace, Embedded]:
    workspace = Workspace(tmp_path_factory.mktemp("metrics"), model)
    return workspace, workspace.embed(RAW)


def rows_of(embedded: Embedded) -> tuple[list[str], np.ndarray]:
    table = read_dataset(embedded.embeddings.folder, embedded.embeddings.manifest)
    return table["image_id"].to_pylist(), vectors_of(table)


def test_raw_vectors_are_float32_and_part_of_the_encoders_identity(
    made: tuple[Workspace, Embedded], model: Path, tmp_path: Path
) -> None:
    _, raw = made
    ids, vectors = rows_of(raw)
    assert vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.max() > 1.05 * lengths.min() > 0
    unit = Workspace(tmp_path, model).embed()
    names, normalised = rows_of(unit)
    assert names == ids
    assert normalised.dtype == np.float16
    np.testing.assert_allclose(normalised, vectors / lengths[:, None], atol=1e-3)
    assert unit.embeddings.manifest.fingerprint != raw.embeddings.manifest.fingerprint
    encoders = [one.embeddings.manifest.properties["encoder"] for one in (raw, unit)]
    assert encoders[0] == encoders[1] | {"normalize": False}


@pytest.mark.parametrize(
    ("metric", "pca"),
    [("cosine", False), ("euclidean", False), ("euclidean", True), ("inner_product", False)],
)
def test_neighbours_are_those_of_the_features_themselves(
    made: tuple[Workspace, Embedded], metric: str, pca: bool
) -> None:
    workspace, embedded = made
    overrides = [f"index.metric={metric}"]
    if pca:
        overrides.append("index.transform={type: pca, dim: 16, whitening: none}")
    config = load(workspace.config, RAW, *overrides)
    index = build_index(config, session(), embedded.embeddings.folder)
    joined = join_neighbors(config, session(), index.folder)
    properties = index.manifest.properties
    assert (properties["metric"], joined.manifest.properties["metric"]) == (metric, metric)
    assert properties["evaluation_overlaps_training"] is True
    assert properties["training_rows"] == 20
    ids, vectors = rows_of(embedded)
    wide = vectors.astype(np.float64)
    if metric == "cosine":
        assert (properties["scale_exponent"], properties["worst_relative_rounding"]) == (0, None)
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    else:
        longest = np.linalg.norm(wide, axis=1).max() * 2.0 ** properties["scale_exponent"]
        assert longest <= 1
        assert longest > (0.25 if pca else 0.5)
        assert 1e-6 < properties["worst_relative_rounding"] < 2**-11
    products = wide @ wide.T
    squares = np.diag(products)
    direct = products if metric != "euclidean" else 2 * products - squares[:, None] - squares
    row_of = {name: row for row, name in enumerate(ids)}
    for row in read_dataset(joined.folder, joined.manifest).to_pylist():
        query = row_of[row["query_id"]]
        best = np.sort(np.delete(direct[query], query))[::-1][:K]
        # Scores are in the units of the features, up to what the rounding to float16 costs.
        tolerance = 2e-3 * (1 if metric == "cosine" else squares.max())
        np.testing.assert_allclose(row["scores"], best, atol=tolerance)
        chosen = [direct[query, row_of[name]] for name in row["neighbor_ids"]]
        np.testing.assert_allclose(chosen, best, atol=tolerance)


def faiss_neighbours(folder: str, manifest: Manifest, queries: np.ndarray) -> np.ndarray:
    """The scores of the K + 1 best, found by plain FAISS in all shards."""
    found = []
    for part in manifest.parts:
        if part.name != "shared":
            shard = faiss.read_index(f"{folder}/{part.file('.faiss').path}")
            shard.nprobe = shard.nlist
            scores, rows = shard.search(queries, K + 1)
            euclidean = shard.metric_type == faiss.METRIC_L2
            found.append(np.where(rows < 0, -np.inf, -scores if euclidean else scores))
    return np.sort(np.hstack(found))[:, ::-1][:, : K + 1]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "inner_product"])
def test_plain_faiss_scores_as_the_join_does(made: tuple[Workspace, Embedded], metric: str) -> None:
    workspace, embedded = made
    config = load(workspace.config, RAW, f"index.metric={metric}")
    folder = build_index(config, session(), embedded.embeddings.folder).folder
    joined = join_neighbors(config, session(), folder)
    index = open_index(folder)
    ids, vectors = rows_of(embedded)
    transform = index.trained.transform
    found = faiss_neighbours(folder, index.manifest, transform.apply(vectors).astype(np.float32))
    by_id = dict(zip(ids, found, strict=True))
    for row in read_dataset(joined.folder, joined.manifest).to_pylist():
        ours = np.array(row["scores"]) / transform.unscale
        # FAISS finds the query too; under inner_product not always first.
        theirs = by_id[row["query_id"]]
        assert all(np.abs(theirs - score).min() < 2e-6 for score in ours), row["query_id"]


def test_another_night_takes_raw_vectors_over(model: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, model)
    overrides = (RAW, "index.metric=euclidean")
    run_nightly(load(workspace.config, *overrides), session())
    before = dict(zip(*rows_of(workspace.embed(*overrides)), strict=True))
    # Both shards get other files: a copy of a picture, one that changed, and a new one twice.
    workspace.add("again.png", 19)
    workspace.add("new.png", 50)
    workspace.add("new-too.png", 50)
    workspace.add("photo-03.png", 51)
    tonight = workspace.embed(*overrides)
    books = tonight.books
    assert (books.read, books.embedded, books.reused) == (23, 2, 21)
    ids, vectors = rows_of(tonight)
    assert vectors.dtype == np.float32
    found = dict(zip(ids, vectors, strict=True))
    for name, vector in before.items():
        assert (found[name].tobytes() == vector.tobytes()) == (name != "photo-03.png"), name
    assert found["again.png"].tobytes() == found["photo-19.png"].tobytes()
    assert found["new.png"].tobytes() == found["new-too.png"].tobytes()
    # Unit vectors of the same encoder are others: only the second of two in a shard is taken over.
    assert workspace.embed().books.embedded == 23 - 1
    # A replay keeps what was embedded.
    replayed = workspace.embed(*overrides, replay=tonight.embeddings.folder)
    assert replayed.embeddings.manifest.content == tonight.embeddings.manifest.content
    with pytest.raises(FingerprintError, match="normalize: the dataset has False"):
        workspace.embed(replay=tonight.embeddings.folder)
    # And a search asks with vectors of the same kind.
    published = Published(tmp_path / "w")
    index = published.folder("index")
    for line in published.jsonl().splitlines():
        scores = [neighbor["score"] for neighbor in json.loads(line)["neighbors"]]
        assert scores == sorted(scores, reverse=True)
        assert max(scores) < 0
    evaluated = json.loads((published.folder("evaluation") / "evaluation.json").read_text())["scores"]
    assert evaluated["edges"][0] < evaluated["edges"][-1] <= 0
    assert sum(evaluated["counts"]) == IMAGES
    image = str(workspace.photos / "photo-05.png")
    (result,) = search_images(load(workspace.config, *overrides), str(index), [image], 1)
    assert result.neighbors[0]["image_id"] == "photo-05.png"
    assert result.neighbors[0]["score"] == pytest.approx(0, abs=1e-4)


def test_a_corpus_that_cannot_be_indexed_leaves_nothing(
    made: tuple[Workspace, Embedded], tmp_path: Path
) -> None:
    workspace, embedded = made
    folder = tmp_path / "embeddings"
    shutil.copytree(embedded.embeddings.folder, folder)
    manifest = embedded.embeddings.manifest
    part = manifest.parts[1]
    table = pq.read_table(folder / part.files[0].path)
    vectors = vectors_of(table).copy()
    vectors[2, 5], vectors[3] = np.nan, 0
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    place = table.column_names.index("vector")
    pq.write_table(
        table.set_column(place, table.schema.field(place), column), folder / part.files[0].path
    )
    document = json.loads((folder / "_manifest.json").read_text())
    file = manifests.describe_file(str(folder), part.files[0].path)
    document["parts"][1]["files"] = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256}]
    parts = tuple(manifests.Part.from_json(one) for one in document["parts"])
    changed = Manifest(
        manifest.kind, manifest.fingerprint, manifest.fingerprints, manifest.schema, parts,
        manifest.properties,
    )  # fmt: skip
    (folder / "_manifest.json").write_text(json.dumps(changed.to_json()))
    config = load(workspace.config, RAW, f"workspace={tmp_path / 'w'}")
    with pytest.raises(DatasetError) as caught:
        build_index(config, session(), str(folder))
    ids = table["image_id"].to_pylist()
    assert str(caught.value).splitlines()[1] == (
        f"  {part.name}: 1 of its vectors is not finite (image_id {ids[2]}); 1 of its vectors is zero, "
        f"which has no direction under cosine (image_id {ids[3]})"
    )
    written = [path for path in (tmp_path / "w" / "index").rglob("*") if path.is_file()]
    assert [path.name for path in written] == []
