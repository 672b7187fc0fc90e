"""Readers of what a run left in its workspace, and changes to a small catalogue."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.datasets import manifests, storage
from index_builder.datasets.manifests import Manifest


@dataclasses.dataclass(frozen=True)
class Published:
    """The snapshot that a workspace publishes."""

    workspace: Path

    @property
    def pointer(self) -> dict[str, Any]:
        return json.loads((self.workspace / "current.json").read_text())

    @property
    def run(self) -> dict[str, Any]:
        return json.loads((self.workspace / self.pointer["run_path"] / "run.json").read_text())

    def folder(self, kind: str) -> Path:
        return self.workspace / self.pointer["datasets"][kind]

    def manifest(self, kind: str) -> Manifest:
        return manifests.load(str(self.folder(kind)), kind)

    def table(self, kind: str) -> pa.Table:
        """The rows of all parts, in order."""
        return read_dataset(str(self.folder(kind)), self.manifest(kind))

    def jsonl(self) -> bytes:
        """The recommendations as they are loaded: all JSONL parts, one after another."""
        folder, parts = self.folder("recommendations"), self.manifest("recommendations").parts
        return b"".join((folder / part.file(".jsonl").path).read_bytes() for part in parts)


def read_dataset(folder: str, manifest: Manifest) -> pa.Table:
    """Reads all Parquet parts of a dataset, in order, without Kith's own reader."""
    paths = [storage.join(folder, part.file(".parquet").path) for part in manifest.parts]
    return pa.concat_tables([pq.read_table(path) for path in paths])


def vectors_of(table: pa.Table) -> np.ndarray:
    """The embeddings, float16 [n, dim]."""
    return table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def copy_catalogue(catalogue: Path, target: Path) -> Path:
    """Copies the images of a small catalogue, so that a test may change them."""
    for name in ("catalog", "hard"):
        shutil.copytree(catalogue / name, target / name)
    return target


def flip_byte(path: Path) -> None:
    """Changes one bit in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
