"""Datasets: parts plus `_manifest.json`, written last. No manifest, no dataset.

While a dataset is being made, each finished part has a marker in `_work/`, so that a killed stage
resumes at the part it had reached. Committing turns the markers into the manifest and removes them.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from index_builder.datasets import storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.errors import DatasetError

SCHEMA_VERSION = 1
MANIFEST_NAME = "_manifest.json"
WORK_FOLDER = "_work"
# Files that a message names; all are counted.
_MOST_LISTED = 5


@dataclasses.dataclass(frozen=True)
class PartFile:
    """One file of a part: `path` is relative to the dataset's folder and may lead outside it."""

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work that is written, committed and reused whole.

    `key` is the fingerprint of everything that decided its content; `properties` holds the figures
    of its kind (plain JSON values).
    """

    name: str
    key: str
    rows: int
    files: tuple[PartFile, ...]
    properties: dict[str, Any] = dataclasses.field(default_factory=dict)

    def file(self, suffix: str) -> PartFile:
        """Returns the part's file with a suffix such as `.parquet`. Raises DatasetError."""
        for file in self.files:
            if file.path.endswith(suffix):
                return file
        raise DatasetError(
            f"Part {self.name} has no {suffix} file, only {[file.path for file in self.files]}. "
            "Make the dataset again."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the part as plain JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Part":
        """Rebuilds a part from `to_json`. Raises KeyError or TypeError for anything else."""
        files = tuple(PartFile(**file) for file in value["files"])
        return Part(value["name"], value["key"], value["rows"], files, value["properties"])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a complete dataset consists of and where it comes from.

    `fingerprint` identifies what the dataset was made from (code, config, inputs); `content` is a
    digest of the parts' checksums, which later stages take as the fingerprint of their input.
    """

    kind: str
    fingerprint: str
    fingerprints: dict[str, Any]
    schema: list[dict[str, str]]
    parts: tuple[Part, ...]
    properties: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all files of all parts."""
        return sum(file.bytes for part in self.parts for file in part.files)

    @property
    def content(self) -> str:
        """Digest of the content: the same parts in the same order give the same digest."""
        return fingerprint(
            {
                "kind": self.kind,
                "schema": self.schema,
                "parts": [[file.sha256 for file in part.files] for part in self.parts],
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the document that is written to `_manifest.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "fingerprints": self.fingerprints,
            "content": self.content,
            "schema": self.schema,
            "rows": self.rows,
            "bytes": self.bytes,
            "parts": [part.to_json() for part in self.parts],
            "properties": self.properties,
        }


def manifest_path(folder: str) -> str:
    """Returns the path of a dataset's manifest."""
    return storage.join(folder, MANIFEST_NAME)


def is_complete(folder: str) -> bool:
    """Tells whether a folder holds a committed dataset."""
    return storage.exists(manifest_path(folder))


def load(folder: str, kind: str) -> Manifest:
    """Reads the manifest of a dataset.

    Raises DatasetError when there is none, when it has another schema version, is of another kind
    or has been damaged.
    """
    path = manifest_path(folder)
    try:
        value = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(
            f"{folder} is not a complete {kind} dataset: it has no {MANIFEST_NAME}. "
            "Run the stage that makes it, or give the folder of a finished dataset."
        ) from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise DatasetError(
            f"{path} has schema version {found}, this version of Kith reads {SCHEMA_VERSION}. "
            "Make the dataset again or use the version of Kith that wrote it."
        )
    if value.get("kind") != kind:
        raise DatasetError(
            f"{folder} holds a dataset of kind {value.get('kind')!r}, wanted {kind!r}. "
            "Give the folder of the right dataset."
        )
    try:
        manifest = Manifest(
            kind=value["kind"],
            fingerprint=value["fingerprint"],
            fingerprints=value["fingerprints"],
            schema=value["schema"],
            parts=tuple(Part.from_json(part) for part in value["parts"]),
            properties=value["properties"],
        )
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{path} is damaged: {error!r} does not fit the schema. Make the dataset again."
        ) from error
    if manifest.content != value.get("content"):
        raise DatasetError(
            f"{path} is damaged: its content digest is {value.get('content')}, its parts give "
            f"{manifest.content}. Make the dataset again."
        )
    return manifest


def load_if_usable(folder: str, kind: str, fingerprint_wanted: str) -> Manifest | None:
    """Returns the manifest of a complete dataset with a given fingerprint and all its files.

    Returns None where the dataset has to be made: no manifest, another fingerprint, or a file that
    is missing or has another size than the manifest says.
    """
    if not is_complete(folder):
        return None
    manifest = load(folder, kind)
    if manifest.fingerprint != fingerprint_wanted:
        return None
    intact = all(is_intact(folder, part) for part in manifest.parts)
    return manifest if intact else None


def is_intact(folder: str, part: Part) -> bool:
    """Tells whether all files of a part are there with the right size (checksums are not read)."""
    return all(storage.size(storage.join(folder, f.path)) == f.bytes for f in part.files)


def require_files(folder: str, manifest: Manifest) -> None:
    """Raises DatasetError when a file of a dataset is missing or has another size than it should.

    A look at every file before work starts; checksums are left to the tasks that read the files.
    """
    bad = []
    for part in manifest.parts:
        for file in part.files:
            found = storage.size(storage.join(folder, file.path))
            if found != file.bytes:
                what = "is missing" if found < 0 else f"has {found} bytes, wanted {file.bytes}"
                bad.append(f"{file.path} {what}")
    if bad:
        raise DatasetError(
            f"{folder} is damaged: {len(bad)} of its files are not what {MANIFEST_NAME} says: "
            f"{'; '.join(bad[:_MOST_LISTED])}. Delete the folder and run the stage that makes it again."
        )


def describe_file(folder: str, path: str) -> PartFile:
    """Measures a finished file of a dataset: its size and checksum."""
    full = storage.join(folder, path)
    return PartFile(path, storage.size(full), storage.sha256_of(full))


def verify_file(folder: str, file: PartFile) -> str:
    """Checks a file against its manifest entry and returns its full path.

    Raises DatasetError when it is missing or its checksum differs.
    """
    path = storage.join(folder, file.path)
    try:
        found = storage.sha256_of(path)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is missing, but {manifest_path(folder)} lists it. Make the dataset again."
        ) from error
    if found != file.sha256:
        raise DatasetError(
            f"{path} does not match its checksum: got sha256 {found}, the manifest says "
            f"{file.sha256}. The file was changed or damaged: delete it and run the stage again."
        )
    return path


def _marker_path(folder: str, name: str) -> str:
    return storage.join(folder, WORK_FOLDER, f"{name}.json")


def mark_part(folder: str, part: Part) -> None:
    """Records that a part is finished: all its files are in place."""
    storage.write_json(_marker_path(folder, part.name), part.to_json())


def finished_part(folder: str, name: str, key: str) -> Part | None:
    """Returns the part that an earlier attempt finished, or None when it has to be made.

    A marker with another key, or whose files are missing or of another size, does not count.
    """
    try:
        part = Part.from_json(storage.read_json(_marker_path(folder, name)))
    except FileNotFoundError:
        return None
    return part if part.key == key and is_intact(folder, part) else None


def count_finished(folder: str) -> int:
    """Counts the parts marked as finished, for a progress display."""
    return len(storage.glob(storage.join(folder, WORK_FOLDER, "*.json")))


def commit(folder: str, manifest: Manifest) -> None:
    """Writes the manifest, which makes the dataset exist, then removes markers and leftovers."""
    storage.write_json(manifest_path(folder), manifest.to_json())
    clear_work(folder)


def clear_work(folder: str) -> None:
    """Removes markers, scratch and unfinished writes from a committed dataset.

    A run that was killed between writing the manifest and this leaves them to the next one.
    """
    storage.remove(storage.join(folder, WORK_FOLDER))
    storage.sweep_temporary(folder)


def relocate(part: Part, source_folder: str, target_folder: str) -> Part:
    """Returns a part of one dataset as another dataset names it, without copying its files.

    Both folders must be siblings in one workspace, which keeps the reference relative.
    """
    base = _relative(source_folder, target_folder)
    files = tuple(
        dataclasses.replace(file, path=os.path.normpath(os.path.join(base, file.path)))
        for file in part.files
    )
    return dataclasses.replace(part, files=files)


def _relative(source_folder: str, target_folder: str) -> str:
    if storage.is_remote(source_folder):
        return os.path.relpath(source_folder.split("://", 1)[1], target_folder.split("://", 1)[1])
    return os.path.relpath(source_folder, target_folder)


def collect_parts(folder: str, names: Sequence[str], keys: Sequence[str]) -> tuple[Part, ...]:
    """Reads the markers of all parts that a dataset should have, in order.

    Raises DatasetError when one is missing: the pipeline ended without finishing its work.
    """
    parts = []
    for name, key in zip(names, keys, strict=True):
        part = finished_part(folder, name, key)
        if part is None:
            raise DatasetError(
                f"{folder} is incomplete: part {name} was not finished. Run the stage again; it "
                "goes on where it stopped."
            )
        parts.append(part)
    return tuple(parts)
