"""What every format of named values has in common: where a row's id, item and metadata are."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from pydantic import Field

from index_builder.errors import ImageError
from transforms.settings import Settings
from transforms.sources.base import ImageRecord
from transforms.sources.conversion import convert, identifier


@dataclasses.dataclass(frozen=True)
class FoundRow:
    """A row as a container holds it; its values and its image are had when they are asked for.

    `value_of` returns None for a name that the row lacks, `image` raises ImageError where there is
    none, `names` lists what the row has, for people.
    """

    source_shard: str
    row: int
    value_of: Callable[[str], Any]
    image: Callable[[], bytes]
    names: Callable[[], Iterable[str]]


class RowNames(Settings):
    """The names by which the values of a row are found."""

    # How a value is called in this format, and where the names are configured.
    noun: ClassVar[str] = "Column"
    section: ClassVar[str] = "columns"

    image_id: str = Field("image_id", description="The id of the image (text or whole number).")
    item_id: str | None = Field(
        None, description="The id of the item that the image shows; default: the image's own id."
    )
    metadata: dict[str, str] = Field(
        default_factory=dict,
        description="Metadata column to the name in the source, where the two differ.",
    )

    def record(self, found: FoundRow, metadata: Mapping[str, str]) -> ImageRecord:
        """Reads a row into a record; what is wrong with it becomes the record's error."""
        image_id: str | None = None
        try:
            image_id = identifier(found.value_of(self.image_id), self.subject(self.image_id))
            if image_id is None:
                raise ImageError("missing_id", self.lacks(found, "id", self.image_id, "image_id"))
            item = None
            if self.item_id is not None:
                item = identifier(found.value_of(self.item_id), self.subject(self.item_id))
            columns = {}
            for column, kind in metadata.items():
                name = self.metadata.get(column, column)
                columns[column] = convert(found.value_of(name), self.subject(name), kind)
            data = found.image()
        except ImageError as error:
            return ImageRecord(image_id, found.source_shard, found.row, error=error)
        return ImageRecord(image_id, found.source_shard, found.row, data, item, columns)

    def wanted(self, metadata: Mapping[str, str]) -> list[str]:
        """Returns the names in the source that a record is made of, without repetition."""
        names = [self.image_id, self.item_id]
        names += [self.metadata.get(column, column) for column in metadata]
        return list(dict.fromkeys(name for name in names if name is not None))

    def subject(self, name: str) -> str:
        """Returns how an error begins that is about a value."""
        return f"{self.noun} {name!r}"

    def lacks(self, found: FoundRow, what: str, name: str, key: str) -> str:
        """Returns the text about a row that does not hold its id or image."""
        return (
            f"{self.subject(name)} holds no {what}; the record has {sorted(found.names())}. "
            f"Set images.sources.{self.section}.{key}."
        )
