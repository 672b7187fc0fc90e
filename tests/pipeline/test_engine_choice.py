"""The engine is settled once, and kept: by the published snapshot, before that by the workspace."""

import json
from pathlib import Path
from typing import Any

import pytest

from index_builder.errors import DatasetError, KithError
from pipelines import engine_choice
from pipelines.engine_choice import recall_engine, settle_engine
from pipelines.locate import find_embeddings
from pipelines.nightly import run_nightly
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import load, session, write_config
from tests.unit.images_for_tests import encode, picture
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.keras_runtime import import_keras


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    keras = import_keras()
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(encode(picture(40, 50, number), "PNG"))
    keras.utils.set_random_seed(7)
    network = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(8, 8, strides=8)])
    network.save(tmp_path / "model.keras")
    return tmp_path


def config_of(folder: Path, **encoder: Any) -> Any:
    network = {"name": "custom", "weights": str(folder / "model.keras"), "preprocessing": "tf"}
    path = write_config(
        folder / "c.yaml",
        folder,
        folder / "w",
        images={"sources": [{"format": "files", "paths": f"{folder}/images/*"}]},
        encoder=network | encoder,
        index={"shards": 1},
        evaluate={},
        export={},
    )
    return load(path)


def answer(monkeypatch: pytest.MonkeyPatch, engine: str) -> list[str]:
    """Lets the workers answer with an engine; returns the list of questions that they get."""
    asked: list[str] = []

    def choose(spec: object, precision: str) -> tuple[str, str]:
        asked.append(precision)
        return engine, "the test says so"

    monkeypatch.setattr(engine_choice, "choose_engine", choose)
    return asked


def test_a_worker_is_asked_once(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(catalogue)
    assert recall_engine(config) is None
    with pytest.raises(DatasetError, match="nothing was embedded yet. Run kith embed"):
        find_embeddings(config)
    asked = answer(monkeypatch, "openvino")
    assert settle_engine(config, session()) == EngineChoice("openvino")
    assert settle_engine(config, session()) == EngineChoice("openvino")
    assert recall_engine(config) == EngineChoice("openvino")
    assert asked == ["float32"]
    # Another precision is another question.
    assert settle_engine(config_of(catalogue, precision="bfloat16"), session()).precision == "bfloat16"
    assert asked == ["float32", "bfloat16"]


def test_the_published_engine_is_kept_by_other_machines(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "tensorflow")
    run_nightly(config_of(catalogue), session())
    published = Published(catalogue / "w")
    assert published.manifest("embeddings").properties["encoder"]["engine"] == "tensorflow"
    # Another machine would choose another engine, and its workspace holds no answer.
    asked = answer(monkeypatch, "openvino")
    for record in (catalogue / "w" / "engines").iterdir():
        record.unlink()
    run_nightly(config_of(catalogue), session())
    assert Published(catalogue / "w").run["stages"]["embed"]["state"] == "unchanged"
    assert asked == []
    # Another encoder begins afresh, and so does who asks for an engine by name.
    assert settle_engine(config_of(catalogue, pooling="max"), session()) == EngineChoice("openvino")
    run_nightly(config_of(catalogue, engine="openvino"), session())
    run = Published(catalogue / "w").run
    assert (run["encoder"]["engine"], run["images"]["reused"]) == ("openvino", 0)


def test_a_worker_without_the_engine_refuses(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transforms.encoders.engines import choice

    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KithError, match="encoder.engine is openvino, but this worker has no openvino"):
        run_nightly(config_of(catalogue, engine="openvino"), session())
    assert not (catalogue / "w" / "current.json").exists()


def test_a_damaged_answer_is_refused(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "openvino")
    settle_engine(config_of(catalogue), session())
    (record,) = (catalogue / "w" / "engines").iterdir()
    record.write_text(json.dumps({"engine": "abacus"}))
    with pytest.raises(KithError, match="names the engine 'abacus', wanted one of tensorflow"):
        recall_engine(config_of(catalogue))
