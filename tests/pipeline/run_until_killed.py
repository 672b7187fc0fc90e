"""Runs nightly again and again in one workspace, each run killed at one of its writes.

A run is a child of this process, which has imported everything and used nothing, so a run costs no
imports. It kills itself with SIGKILL where a file is about to get its final name, or just has got it.
TensorFlow is imported too, but starts its threads in the children. Prints one JSON object: the name
of the file at which each run was killed, in order.

Usage: python -m tests.pipeline.run_until_killed CONFIG WRITES..., where WRITES are the numbers of the
writes at which successive runs die, negative to die after the file has got its name; when the list is
used up, its last number is used again until a run gets to its end. A shard is four writes, so a run
that dies at its fifth or later gets further than the one before it.
"""

import ctypes
import json
import os
import signal
import sys
from typing import NoReturn

from pipelines.nightly import run_nightly
from tests.pipeline.small_catalogue import load, session
from transforms.encoders.keras_runtime import import_keras

MOST_RUNS = 40


def main(config_path: str, writes: list[int]) -> None:
    """Runs until a run ends by itself; raises where one fails or never ends."""
    import_keras()
    killed = []
    for number in range(MOST_RUNS):
        at = writes[min(number, len(writes) - 1)]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            # Nothing outlives this process, however it ends (PR_SET_PDEATHSIG is 1).
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            os.close(read)
            _run(config_path, at, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            name = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed.append(name)
        elif status == 0:
            print(json.dumps(killed))
            return
        else:
            raise RuntimeError(f"run {number} ended with status {status}")
    raise RuntimeError(f"no run came to its end in {MOST_RUNS}")


def _run(config_path: str, at: int, pipe: int) -> NoReturn:
    replace, count = os.replace, 0

    def dying_replace(source: str, target: str) -> None:
        nonlocal count
        # The probe of the workspace, before any work, is no progress.
        if "/.probe-" in str(target):
            replace(source, target)
            return
        count += 1
        if count == abs(at):
            os.write(pipe, str(target).encode())
            if at < 0:
                replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying_replace
    status = 1
    try:
        run_nightly(load(config_path), session())  # type: ignore[arg-type]
        status = 0
    finally:
        # Not sys.exit: what the parent imported has exit handlers of its own.
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], [int(text) for text in sys.argv[2:]])
