"""The interface of a source: list the shards of a catalogue, read the images of one shard."""

import abc
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import Field, field_validator

from index_builder.datasets import storage
from index_builder.errors import ConfigError, ImageError, KithError
from transforms.locations import Location
from transforms.settings import Settings

_GLOB_CHARACTERS = frozenset("*?[")


@dataclasses.dataclass(frozen=True)
class ImageShard:
    """A unit of reading, small enough to travel through any runner.

    `name` is unique in the catalogue and the same on every machine; `token` changes when the
    content does. `path` is where to read; `start` and `stop` select entries of a listing.
    """

    source: int
    name: str
    token: str
    path: str
    start: int = 0
    stop: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image as it was found: its encoded bytes, or the reason why there are none.

    `source_shard` and `row` say where it was found; `image_id` is None where the source has none.
    """

    image_id: str | None
    source_shard: str
    row: int
    data: bytes = b""
    item_id: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: ImageError | None = None


@dataclasses.dataclass(frozen=True)
class UnreadableRegion:
    """A stretch of a container in which images can no longer be told apart.

    `offset` is its first byte in the container, for a compressed one in its content; None where
    the format has no such place. The text says it too.
    """

    source_shard: str
    error: str
    offset: int | None = None


_Item = TypeVar("_Item")


def wanted_rows(
    items: Iterable["_Item | UnreadableRegion"], rows: Sequence[int]
) -> Iterator[tuple[int, _Item]]:
    """Yields the wanted ones of what a container holds, with their rows, and reads no further.

    Unreadable regions have no row. Yields nothing more where the file is gone: it was replaced since.
    """
    wanted = set(rows)
    readable = (item for item in items if not isinstance(item, UnreadableRegion))
    try:
        for row, item in enumerate(readable):
            if row in wanted:
                yield row, item
            if row >= max(wanted):
                break
    except FileNotFoundError:
        return


class ImageSource(Settings, abc.ABC):
    """A source of images, as the configuration states it; `format` tells which."""

    # Settings that decide how fast records are read, and none of them.
    speed_settings: ClassVar[frozenset[str]] = frozenset()

    paths: tuple[Location, ...] = Field(
        min_length=1, description="Files to read: paths or globs, local or `gs://`."
    )
    name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="First part of every `source_shard`; by default the folder's own name.",
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def base(self) -> str:
        """The folder that all paths have in common, up to the first wildcard."""
        bases = [fixed_folder(path) for path in self.paths]
        if storage.is_remote(bases[0]):
            return bases[0] if len(set(bases)) == 1 else bases[0].rsplit("/", 1)[0]
        return os.path.commonpath(bases)

    @property
    def label(self) -> str:
        """The name of the source: given, or the last part of the common folder."""
        return self.name or os.path.basename(self.base.rstrip("/")) or "images"

    def relative(self, path: str) -> str:
        """Returns a file's path relative to the source's common folder."""
        return path.removeprefix(self.base).lstrip("/")

    def reading(self) -> dict[str, Any]:
        """Returns the settings that decide which records a shard's content gives."""
        return self.model_dump(mode="json", exclude={"paths", "name", *self.speed_settings})

    def find_files(self) -> list[str]:
        """Lists the files that the paths name, sorted, without repetition.

        Raises ConfigError where a path or the folder of a glob does not exist, and KithError where
        a glob matches nothing.
        """
        found: set[str] = set()
        for path in self.paths:
            matches = storage.glob(path)
            if not matches:
                self._explain_nothing(path)
            found.update(matches)
        return sorted(found)

    def path_of(self, source_shard: str) -> str:
        """Returns the file that is a shard, for formats whose files are containers."""
        return storage.join(self.base, source_shard.removeprefix(f"{self.label}/"))

    def one_shard_a_file(self, number: int) -> list[ImageShard]:
        """Lists every file as one shard, for formats whose files are containers."""
        paths = self.find_files()
        return [
            ImageShard(number, f"{self.label}/{self.relative(path)}", token, path)
            for path, token in zip(paths, storage.content_tokens(paths), strict=True)
        ]

    def _explain_nothing(self, path: str) -> None:
        folder = fixed_folder(path)
        if not _GLOB_CHARACTERS & set(path) or not (storage.is_remote(folder) or os.path.isdir(folder)):
            missing = path if not _GLOB_CHARACTERS & set(path) else folder
            raise ConfigError(
                f"images.sources ({self.label}).paths: {missing} does not exist, wanted image "
                "files. Correct the path; a relative path in a config file is relative to that "
                "file's folder."
            )
        raise KithError(
            f"The catalogue is empty: no file matches {path} (images.sources, {self.label}). "
            "Put images there or correct the pattern."
        )

    @abc.abstractmethod
    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists the shards, in order; `number` is the source's place in the catalogue.

        A source may keep listings, named by their content, in the folder `scratch`.
        """

    @abc.abstractmethod
    def read(
        self, shard: ImageShard, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        """Yields every image of a shard, in order; an unreadable one as a record with an error.

        `metadata` names the wanted columns and their types.
        """

    @abc.abstractmethod
    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Returns the encoded bytes of a few images; those that cannot be had are left out."""


def fixed_folder(path: str) -> str:
    """Returns the folder of a path or glob up to its first wildcard."""
    parts = path.split("/")
    fixed = []
    for part in parts[:-1]:
        if _GLOB_CHARACTERS & set(part):
            break
        fixed.append(part)
    return "/".join(fixed) or "/"
