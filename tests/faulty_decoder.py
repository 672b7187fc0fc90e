"""Real faults for child processes: a decoder that crashes or hangs on images with a marker in them.

`write_faults` makes a folder with a `sitecustomize.py`, which Python runs when it starts with that
folder on PYTHONPATH, and which puts the fault in front of `transforms.decoding.decode_image`.
"""

import os
from pathlib import Path
from typing import Literal

MARKER = b"the decoder does not survive this"
HANG_SEC = 600

_SITECUSTOMIZE = """
import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
import threading

MARKER = {marker!r}
FAULT, ONLY_ON_THREADS = {fault!r}, {only_on_threads!r}


def put_fault_in(module):
    decode_image = module.decode_image

    def faulty(data, *arguments, **options):
        on_thread = threading.current_thread() is not threading.main_thread()
        if MARKER in data:
            print("printed by a decoder", flush=True)
        if MARKER in data and (on_thread or not ONLY_ON_THREADS):
            if FAULT == "segfault":
                ctypes.string_at(0)
            elif FAULT == "exit":
                ctypes.CDLL(None)._exit(3)
            else:
                ctypes.CDLL(None).sleep({hang_sec})  # in C, without the lock of the interpreter
        return decode_image(data, *arguments, **options)

    module.decode_image = faulty


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transforms.decoding":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            put_fault_in(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def write_faults(
    folder: Path, fault: Literal["segfault", "exit", "hang"], *, only_on_threads: bool = False
) -> dict[str, str]:
    """Writes the folder; returns the environment for a process in which the fault is to happen."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _SITECUSTOMIZE.format(
        marker=MARKER, fault=fault, only_on_threads=only_on_threads, hang_sec=HANG_SEC
    )
    (folder / "sitecustomize.py").write_text(text)
    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), root])}
