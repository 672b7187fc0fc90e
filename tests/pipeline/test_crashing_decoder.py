"""A decoder that ends the process or never returns costs its own image, and nothing else."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.embed_images import Embedded, embed_images
from tests.faulty_decoder import MARKER, write_faults
from tests.pipeline.small_catalogue import dataset_bytes, load, session, write_config
from tests.unit.images_for_tests import encode, picture
from transforms import prepare
from transforms.decoding import DecodedImage
from transforms.encoders.keras_runtime import import_keras

ROOT = Path(__file__).parents[2]
IMAGES = 14
HOSTILE = "image-05.png"


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound pictures, one of which carries the marker, and a small network."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "images").mkdir()
    for number in range(IMAGES):
        name = f"image-{number:02d}.png"
        data = encode(picture(48, 64, number), "PNG") + MARKER * (name == HOSTILE)
        (folder / "images" / name).write_bytes(data)
    keras = import_keras()
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(12, 8, strides=8)])
    model.save(folder / "model.keras")
    return folder


def config_of(catalogue: Path, folder: Path, **images: Any) -> Path:
    """Writes a configuration with its workspace beside it."""
    folder.mkdir(exist_ok=True)
    return write_config(
        folder / "c.yaml",
        catalogue,
        folder / "w",
        images={"sources": [{"format": "files", "paths": f"{catalogue}/images/*"}], **images},
        encoder={
            "name": "custom",
            "weights": str(catalogue / "model.keras"),
            "preprocessing": "tf",
            "input_size": [32, 32],
            "decode_threads": 3,
            "batch_size": 4,
            "engine": "tensorflow",
        },
        evaluate={},
        export={},
    )


def rows_of(folder: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder).to_pylist())


def assert_only_the_hostile_image_failed(made: Embedded, expected: Embedded, reason: str) -> None:
    (failure,) = rows_of(made.failures.folder)
    assert (failure["image_id"], failure["stage"], failure["reason"]) == (HOSTILE, "decode", reason)
    wanted = [row for row in rows_of(expected.embeddings.folder) if row["image_id"] != HOSTILE]
    assert rows_of(made.embeddings.folder) == wanted
    assert len(wanted) == IMAGES - 1


def assert_nothing_left_behind(workspace: Path) -> None:
    assert [str(path) for path in workspace.rglob("*in-flight*")] == []
    assert [str(path) for path in workspace.rglob("_work")] == []


@pytest.fixture(scope="module")
def undisturbed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """The datasets where the decoder has no fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = embed_images(load(config_of(catalogue, folder)), session())
    assert made.failures.manifest.rows == 0
    return made


@pytest.fixture(scope="module")
def died(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that died of a segmentation fault in the decoder."""
    folder = tmp_path_factory.mktemp("died")
    script = (
        "import sys\n"
        "from pipelines.embed_images import embed_images\n"
        "from tests.pipeline.small_catalogue import load, session\n"
        "embed_images(load(sys.argv[1]), session())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(config_of(catalogue, folder))],
        capture_output=True, env=write_faults(folder / "faults", "segfault"), cwd=ROOT, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGSEGV, done.stderr.decode()[-3000:]
    assert list(folder.rglob("*.marks"))
    return folder


def test_the_run_after_a_crash_finds_the_image_that_did_it(
    catalogue: Path, died: Path, undisturbed: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(died / "w", tmp_path / "w")
    # The threads of this process are sound; a process that decodes one image alone has the fault.
    monkeypatch.setenv("PYTHONPATH", str(died / "faults"))
    made = embed_images(load(config_of(catalogue, tmp_path)), session())
    assert_only_the_hostile_image_failed(made, undisturbed, "decoder_crashed")
    assert "SIGSEGV" in rows_of(made.failures.folder)[0]["error"]
    assert_nothing_left_behind(tmp_path / "w")


def test_an_image_that_can_be_decoded_alone_is_embedded_after_all(
    catalogue: Path, died: Path, undisturbed: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(died / "w", tmp_path / "w")
    decode, decoded = prepare.decode_image, []

    def watched(data: bytes, *arguments: Any) -> DecodedImage:
        decoded.append(MARKER in data)
        return decode(data, *arguments)

    monkeypatch.setattr(prepare, "decode_image", watched)
    embed_images(load(config_of(catalogue, tmp_path)), session())
    workspace = Path(undisturbed.embeddings.folder).parents[1]
    assert dataset_bytes(tmp_path / "w") == dataset_bytes(workspace)
    assert_nothing_left_behind(tmp_path / "w")
    # At most one image a thread was in flight; the hostile one was, and met no thread again.
    assert IMAGES - 3 <= len(decoded) < IMAGES
    assert True not in decoded


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a stuck thread waits for; opened at the end, so that it ends."""
    event = threading.Event()
    yield event
    event.set()


def test_an_image_that_hangs_costs_no_more_than_its_time(
    catalogue: Path,
    undisturbed: Embedded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gate: threading.Event,
) -> None:
    decode = prepare.decode_image

    def hanging(data: bytes, *arguments: Any) -> DecodedImage:
        if MARKER in data:
            assert gate.wait(120)
        return decode(data, *arguments)

    monkeypatch.setattr(prepare, "decode_image", hanging)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "faults"))
    write_faults(tmp_path / "faults", "hang")
    made = embed_images(load(config_of(catalogue, tmp_path, decode_timeout_sec=1.0)), session())
    assert_only_the_hostile_image_failed(made, undisturbed, "decoder_timed_out")
    assert "1 seconds" in rows_of(made.failures.folder)[0]["error"]
    assert_nothing_left_behind(tmp_path / "w")
