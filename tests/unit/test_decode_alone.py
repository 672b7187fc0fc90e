"""Decoding in a process of its own: the same pixels, and a verdict on whatever ends the process."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.errors import ImageError, KithError
from tests.faulty_decoder import MARKER, write_faults
from tests.unit.images_for_tests import encode, one_of_each, picture
from transforms import decode_alone as module
from transforms.decode_alone import decode_alone
from transforms.decoding import DecodePolicy, decode_image
from transforms.preprocessing import Preprocessing

SMALL = Preprocessing((8, 12))
POLICY = DecodePolicy()
PNG = encode(picture(), "PNG")
LONG_SEC = 60.0


class Defective(Preprocessing):
    def apply(
        self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        raise ZeroDivisionError("a defect of ours")


class Unfounded(Preprocessing):
    def apply(
        self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        raise KithError("Something is not installed.")


class Short(Preprocessing):
    def apply(
        self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        return super().apply(pixels, full_size)[1:]


# One that TensorFlow has a part in, for its start and its prints.
@pytest.mark.parametrize("name", ["jpeg", "png", "dicom"])
def test_it_gives_what_decoding_here_gives(name: str) -> None:
    data = one_of_each()[name]
    here = decode_image(data, POLICY, SMALL.needed_size)
    alone = decode_alone(data, POLICY, SMALL, LONG_SEC)
    np.testing.assert_array_equal(alone.pixels, SMALL.apply(here.pixels, (here.width, here.height)))
    assert alone.pixels.dtype == np.uint8
    assert (alone.width, alone.height, alone.format) == (here.width, here.height, here.format)


@pytest.mark.parametrize(
    ("data", "policy", "reason"),
    [
        (b"", POLICY, "empty"),
        (b"no image", POLICY, "unsupported_format"),
        (PNG, DecodePolicy(max_pixels=40 * 60 - 1), "too_large"),
    ],
)
def test_it_refuses_what_decoding_here_refuses(data: bytes, policy: DecodePolicy, reason: str) -> None:
    with pytest.raises(ImageError) as here:
        decode_image(data, policy)
    with pytest.raises(ImageError) as alone:
        decode_alone(data, policy, SMALL, LONG_SEC)
    assert alone.value.reason == here.value.reason == reason
    assert alone.value.message == here.value.message


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("segfault", "SIGSEGV (Segmentation fault)"),
        ("exit", "exit status 3"),
    ],
)
def test_a_decoder_that_ends_its_process_has_crashed(
    fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = write_faults(tmp_path / "faults", fault)  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="process of its own") as raised:
        decode_alone(PNG + MARKER, POLICY, SMALL, LONG_SEC)
    assert raised.value.reason == "decoder_crashed"
    assert words in raised.value.message
    # The fault is in the image, not in the process.
    assert decode_alone(PNG, POLICY, SMALL, LONG_SEC).format == "png"
    assert os.listdir(tmp_path / "temporary") == []
    assert sorted(os.listdir(tmp_path)) == ["faults", "temporary"]  # and no dump of the process


def test_a_decoder_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", write_faults(tmp_path, "hang")["PYTHONPATH"])
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"in 0\.3 seconds") as raised:
        decode_alone(PNG + MARKER, POLICY, SMALL, 0.3)
    assert raised.value.reason == "decoder_timed_out"
    assert time.monotonic() - start < 30


def test_a_process_whose_timer_fails_is_killed_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys, time\n"
        "class Deaf:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'transforms.preprocessing':\n"
        "            signal.setitimer = lambda *arguments: time.sleep(600)\n"
        "sys.meta_path.insert(0, Deaf())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "START_SEC", 3.0)
    with pytest.raises(ImageError) as raised:
        decode_alone(PNG, POLICY, SMALL, 0.1)
    assert raised.value.reason == "decoder_timed_out"


def test_what_a_decoder_prints_is_not_taken_for_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = write_faults(tmp_path, "segfault", only_on_threads=True)
    monkeypatch.setenv("PYTHONPATH", faults["PYTHONPATH"])
    alone = decode_alone(PNG + MARKER, POLICY, SMALL, LONG_SEC)
    np.testing.assert_array_equal(alone.pixels, SMALL.apply(picture()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        (Defective((8, 8)), "ZeroDivisionError: a defect of ours"),
        (Unfounded((8, 8)), r"^Something is not installed\.$"),
    ],
)
def test_a_defect_is_not_taken_for_a_bad_image(preprocessing: Preprocessing, words: str) -> None:
    with pytest.raises(KithError, match=words):
        decode_alone(PNG, POLICY, preprocessing, LONG_SEC)


def test_an_answer_of_the_wrong_size_is_no_answer() -> None:
    with pytest.raises(ImageError, match="exit status 0") as raised:
        decode_alone(PNG, POLICY, Short((8, 8)), LONG_SEC)
    assert raised.value.reason == "decoder_crashed"


def test_a_process_that_cannot_import_kith_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        with pytest.raises(KithError, match=r"(?s)status 1 before .*Error.*can import Kith"):
            decode_alone(PNG, POLICY, SMALL, LONG_SEC)


def test_a_missing_interpreter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "python")
    monkeypatch.setattr(sys, "executable", missing)
    with pytest.raises(KithError, match=f"cannot be started from {missing}"):
        decode_alone(PNG, POLICY, SMALL, LONG_SEC)


def test_an_interrupted_wait_kills_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", write_faults(tmp_path, "hang")["PYTHONPATH"])
    started = []
    wait = module.subprocess.Popen.wait

    def interrupted(process, timeout=None):  # type: ignore[no-untyped-def]
        started.append(process.pid)
        if len(started) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(module.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_alone(PNG + MARKER, POLICY, SMALL, LONG_SEC)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], signal.SIGCONT)
