"""What a change of the catalogue or of the encoder costs: only what it touches is embedded again."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets.manifests import Part
from index_builder.errors import ConfigError
from pipelines.embed_images import Embedded, embed_images
from pipelines.embed_plan import plan_embedding
from pipelines.nightly import run_nightly
from pipelines.reuse import carry_over_unchanged, index_vectors, open_for_replay, open_published
from tests.catalog_fixtures import copy_catalogue, flip_byte, read_dataset
from tests.pipeline.small_catalogue import SAMPLES, dataset_bytes, load, session, write_config
from transforms import decoding
from transforms.encoders.engines.choice import DEFAULT_CHOICE


def embed_in_copy(
    finished: Path, data: Path, folder: Path, *overrides: str, **sections: Any
) -> Embedded:
    """Runs the embed stage in a copy of the finished workspace."""
    shutil.copytree(finished, folder / "w")
    config = load(write_config(folder / "c.yaml", data, folder / "w", **sections), *overrides)
    return embed_images(config, session())


def from_scratch(data: Path, folder: Path, *overrides: str, **sections: Any) -> Embedded:
    """Runs the embed stage in an empty workspace."""
    config = load(write_config(folder / "s.yaml", data, folder / "s", **sections), *overrides)
    return embed_images(config, session())


def books_of(part: Part) -> dict[str, Any]:
    """A part's figures but those that say where its vectors come from."""
    origin = ("images_embedded", "images_reused", "model_calls")
    return {name: value for name, value in part.properties.items() if name not in origin}


def assert_same_rows(one: Embedded, other: Embedded) -> None:
    """Both datasets have the same fingerprint, part contents and rows."""
    for a, b in ((one.embeddings, other.embeddings), (one.failures, other.failures)):
        assert a.manifest.fingerprint == b.manifest.fingerprint
        assert a.manifest.content == b.manifest.content
        for part, twin in zip(a.manifest.parts, b.manifest.parts, strict=True):
            assert (part.name, part.key, part.rows) == (twin.name, twin.key, twin.rows)
            assert books_of(part) == books_of(twin)
        assert read_dataset(a.folder, a.manifest).equals(read_dataset(b.folder, b.manifest))


def test_one_more_shard_reuses_the_others(finished: Path, catalogue: Path, tmp_path: Path) -> None:
    data = copy_catalogue(catalogue, tmp_path / "data")
    added = sorted((SAMPLES / "files").rglob("*.jpg"))[:4]
    (data / "more").mkdir()
    for file in added:
        shutil.copy(file, data / "more" / file.name)
    sources = [
        {"format": "tfrecord", "paths": f"{data}/catalog/*.tfrecord"},
        {"format": "files", "paths": f"{data}/hard/*"},
        {"format": "files", "paths": f"{data}/more/*"},
    ]
    metadata = load(write_config(tmp_path / "m.yaml", data, tmp_path / "m")).images.metadata
    images = {"sources": sources, "metadata": metadata}
    grown = embed_in_copy(finished, data, tmp_path, images=images)
    books = grown.books
    assert (books.read, books.embedded, books.reused, books.failed) == (76, 4, 69, 3)
    assert grown.embeddings.counters["embed.images_in"] == 4
    assert_same_rows(grown, from_scratch(data, tmp_path, images=images))
    # Reused parts are named where they are, not copied.
    outside = [file.path for part in grown.embeddings.manifest.parts for file in part.files]
    assert sum(path.startswith("../") for path in outside) == 4


def test_a_changed_shard_alone_is_embedded_again(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    data = copy_catalogue(catalogue, tmp_path / "data")
    flip_byte(data / "catalog" / "images-00001.tfrecord")
    changed = embed_in_copy(finished, data, tmp_path)
    books = changed.books
    assert books.read == 72 == books.embedded + books.reused + books.failed
    # The pictures of the changed shard are known, but the one that was changed.
    assert (books.embedded, books.reused) == (0, 68)
    counters = changed.embeddings.counters
    assert (counters["embed.images_in"], counters["embed.model_calls"]) == (20, 0)
    assert_same_rows(changed, from_scratch(data, tmp_path))


def test_other_pixels_reuse_nothing(finished: Path, catalogue: Path, tmp_path: Path) -> None:
    made = embed_in_copy(finished, catalogue, tmp_path, "encoder.resize=pad")
    assert (made.books.embedded, made.books.reused, made.books.failed) == (69, 0, 3)


@pytest.mark.parametrize(
    "override",
    [
        "encoder.pooling=max",
        "encoder.resize=pad",
        "encoder.interpolation=area",
        "encoder.batch_size=16",
        "encoder.input_size=[192, 192]",
        "encoder.weights=random",
        "images.max_pixels=20000",
        "images.truncated=accept",
        "images.scaled_decoding=false",
        "images.dicom_frame=middle",
        "images.metadata={name: string}",
        "images.sources.0.features={item_id: object_id}",
    ],
)
def test_settings_that_decide_the_rows_give_other_parts(
    catalogue: Path, tmp_path: Path, override: str
) -> None:
    path = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", evaluate={})
    before, after = (plan_embedding(load(path, *more), DEFAULT_CHOICE) for more in ([], [override]))
    assert before.identity != after.identity
    keys = {task.key for task in before.graph.tasks}
    changed = [task.key not in keys for task in after.graph.tasks]
    assert changed == [True] * 3 + [not override.startswith("images.sources.0")]


@pytest.mark.parametrize(
    "override", ["encoder.decode_threads=1", "index.seed=9", "join.k=3", "evaluate.sample=7"]
)
def test_settings_that_do_not_give_the_same_parts(
    catalogue: Path, tmp_path: Path, override: str
) -> None:
    path = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w")
    before, after = (plan_embedding(load(path, *more), DEFAULT_CHOICE) for more in ([], [override]))
    assert before.identity == after.identity
    assert before.graph.tasks == after.graph.tasks


def test_vectors_from_before_a_stricter_rule_are_not_taken_over(
    finished: Path, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", evaluate={})
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.setattr(decoding, "ADMISSION_RULES", decoding.ADMISSION_RULES + 1)
    config = load(path)
    plan = plan_embedding(config, DEFAULT_CHOICE)
    earlier = open_published(config.workspace)
    assert earlier is not None
    plan = dataclasses.replace(plan, encoder=earlier.made.properties["encoder"])
    assert carry_over_unchanged(earlier, plan.graph) == set()
    assert index_vectors(earlier, plan) is None
    with pytest.raises(ConfigError, match="refuses more"):
        open_for_replay(config.workspace, earlier.folder, plan)
    # Datasets that state no number are older than any.
    monkeypatch.undo()
    assert index_vectors(earlier, plan) is not None
    del earlier.made.properties["admission"]["rules"]
    assert index_vectors(earlier, plan) is None


def test_reuse_can_be_switched_off(finished: Path, catalogue: Path, tmp_path: Path) -> None:
    data = copy_catalogue(catalogue, tmp_path / "data")
    (data / "hard" / "photo.webp").unlink()
    made = embed_in_copy(finished, data, tmp_path, "embeddings.reuse=false")
    assert (made.books.read, made.books.embedded, made.books.reused) == (71, 68, 0)


def test_what_embedding_does_not_depend_on_embeds_nothing(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    before = dataset_bytes(tmp_path / "w")
    config = load(
        write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w"),
        "join.k=3",
        "encoder.decode_threads=1",
    )
    run = run_nightly(config, session()).run
    states = {name: stage["state"] for name, stage in run["stages"].items()}
    assert states == {
        "embed": "unchanged",
        "build": "unchanged",
        "join": "made",
        "evaluate": "made",
        "export": "made",
    }
    after = dataset_bytes(tmp_path / "w")
    assert {name: after[name] for name in before} == before


def test_a_moved_catalogue_is_the_same_catalogue(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    data = copy_catalogue(catalogue, tmp_path / "elsewhere")
    made = embed_in_copy(finished, data, tmp_path)
    assert made.embeddings.state == "unchanged"
    assert (made.books.embedded, made.books.reused) == (0, 69)
