"""Decoding one image in a process of its own, which may hang or crash without harm to others.

The process is a fresh interpreter that imports the decoders and nothing else. Its standard input and
output are unnamed temporary files rather than pipes, so neither side can block the other.
"""

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from typing import IO, Any

import numpy as np

from index_builder.errors import ImageError, KithError
from transforms.decoding import DecodedImage, DecodePolicy, decode_image
from transforms.preprocessing import Preprocessing

# For starting an interpreter on a machine that is busy; importing takes 0.2 s on an idle one.
START_SEC = 60.0

# The parent's search path, whatever it was started with; `-c`, because `-m` would import the module
# a second time, as `__main__`.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from transforms.decode_alone import main; main()"
_READY = b"ready\n"


def decode_alone(
    data: bytes, policy: DecodePolicy, preprocessing: Preprocessing, timeout_sec: float
) -> DecodedImage:
    """Decodes and resizes one image in a process that is killed after `timeout_sec`.

    Returns what `decode_image` returns, with the pixels that `preprocessing` makes of it: uint8
    [height, width, 3] of the encoder's input.

    Raises:
        ImageError: what `decode_image` raises; `decoder_crashed` when the process ended without an
            answer, `decoder_timed_out` when it gave none in time.
        KithError: the process could not be started, or failed by something else than the image.
    """
    with (
        tempfile.TemporaryFile() as request,
        tempfile.TemporaryFile() as reply,
        tempfile.TemporaryFile() as errors,
    ):
        pickle.dump((data, policy, preprocessing, timeout_sec), request, pickle.HIGHEST_PROTOCOL)
        request.seek(0)
        status = _run(request, reply, errors, timeout_sec + START_SEC)
        reply.seek(0)
        answer = reply.read()
        if not answer.startswith(_READY):
            errors.seek(0)
            text = errors.read()[-2000:].decode(errors="replace")
            raise KithError(
                f"The process that decodes one image alone ended with status {status} before it had "
                f"started: {text or 'it printed nothing'}. Check that {sys.executable} can import "
                "Kith, and that the machine has memory for another process."
            )
    decoded = _decoded(answer[len(_READY) :], preprocessing)
    if decoded is None:
        raise _verdict(status, timeout_sec)
    return decoded


def _run(request: IO[bytes], reply: IO[bytes], errors: IO[bytes], limit_sec: float) -> int:
    """Runs the process to its end; returns its status, negative where a signal ended it."""
    # It must not take memory of a GPU that the encoder fills.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=request,
            stdout=reply,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise KithError(
            f"A process that decodes one image alone cannot be started from {sys.executable}: "
            f"{error}. Check that the machine allows another process and has memory for it."
        ) from error
    try:
        return process.wait(limit_sec)
    except subprocess.TimeoutExpired:
        # Its own timer should have ended it; a decoder may have blocked the signal.
        return -signal.SIGALRM
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def _decoded(answer: bytes, preprocessing: Preprocessing) -> DecodedImage | None:
    """Reads an answer, which a decoder run wild may have cut short; None where there is none."""
    line, newline, pixels = answer.partition(b"\n")
    if not newline:
        return None
    found: dict[str, Any] = json.loads(line)
    if "failed" in found:
        raise KithError(found["failed"])
    if "refused" in found:
        raise ImageError(found["refused"], found["message"])
    shape = (*preprocessing.input_size, 3)
    if len(pixels) != math.prod(shape):
        return None
    array = np.frombuffer(pixels, np.uint8).reshape(shape)
    return DecodedImage(array, found["width"], found["height"], found["format"])


def _verdict(status: int, timeout_sec: float) -> ImageError:
    if status == -signal.SIGALRM:
        return ImageError(
            "decoder_timed_out",
            f"The decoder did not come to an end in {timeout_sec:g} seconds, in a process of its own.",
        )
    if status >= 0:
        how = f"ended its process with exit status {status}"
    else:
        how = f"ended its process with {_signal_name(-status)}"
    return ImageError(
        "decoder_crashed", f"The decoder {how} while this image was decoded in a process of its own."
    )


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    except ValueError:
        return f"signal {number}"


def main() -> None:
    """The process: reads a request on standard input, writes the answer to standard output."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # A crash is expected, its dump is not wanted.
    data, policy, preprocessing, timeout_sec = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as reply:
        reply.write(_READY)
        reply.flush()
        # What libraries print must neither get into the answer nor fill the disk.
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        # Ends the process whatever C code it is in, and also when nobody waits for it any more.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout_sec)
        reply.write(_answer(data, policy, preprocessing))
    # Not sys.exit: a library that crashes at exit takes nothing back.
    os._exit(0)


def _answer(data: bytes, policy: DecodePolicy, preprocessing: Preprocessing) -> bytes:
    """One line of JSON, followed by the pixels where there are any."""
    pixels = b""
    found: dict[str, object]
    try:
        image = decode_image(data, policy, preprocessing.needed_size)
        size = image.width, image.height
        pixels = preprocessing.apply(image.pixels, size).tobytes()
        found = {"width": image.width, "height": image.height, "format": image.format}
    except ImageError as error:
        found = {"refused": error.reason, "message": error.message}
    except KithError as error:
        found = {"failed": str(error)}
    except Exception:  # A defect of ours, which is no verdict on the image: the parent raises it.
        found = {"failed": f"Decoding one image alone failed:\n{traceback.format_exc()}"}
    return json.dumps(found).encode() + b"\n" + pixels
