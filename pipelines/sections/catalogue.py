"""What is in the catalogue: images, and what is known of them."""

from typing import Any, Literal

from pydantic import Field, field_validator

from pipelines.sections.base import Section
from transforms.decoding import DEFAULT_MAX_PIXELS
from transforms.locations import Location
from transforms.sources.registry import AnySource


class Images(Section):
    """The catalogue: where its images are and what is known of them."""

    sources: tuple[AnySource, ...] = Field(
        (),
        description="One or more sources; each names its `format`. Only stages that run on datasets "
        "made elsewhere go without.",
    )
    metadata: dict[str, Literal["string", "int64", "float64", "bool"]] = Field(
        default_factory=dict,
        description="Columns to carry along, with their types; null where a source has none.",
    )
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS,
        ge=1,
        description="An image with more pixels is a failure (`too_large`), not a memory problem.",
    )
    truncated: Literal["fail", "accept"] = Field(
        "fail",
        description="What becomes of an image whose bytes end too early: a failure (`truncated`), or "
        "what there is of it.",
    )
    scaled_decoding: bool = Field(
        True,
        description="Decode a JPEG at the smallest scale that is not below the encoder's input. Twice "
        "as fast or more; the vectors differ a little, so it is part of the encoder's fingerprint.",
    )
    dicom_frame: Literal["first", "middle"] = Field(
        "first", description="The frame of a DICOM file that has several."
    )
    decode_timeout_sec: float = Field(
        120.0,
        gt=0,
        description="An image that takes longer to decode is tried once more, for as long, in a "
        "process of its own, and is then a failure (`decoder_timed_out`).",
    )


class CatalogMetadata(Section):
    """A table of what changes faster than images, joined by id when the index is built.

    Absent unless `paths` is set. A changed table makes a new index and embeds nothing again.
    """

    paths: tuple[Location, ...] = Field(
        (),
        description="The table: `.parquet`, `.csv` or `.csv.gz` files or globs, local or `gs://`; "
        "`[]` is no table. In CSV an empty value is null.",
    )
    key: Literal["item_id", "image_id"] = Field(
        "item_id", description="The id by which rows are found; an item's values go to all its images."
    )
    id_column: str | None = Field(
        None, min_length=1, description="The table's column with that id; by default named as `key`."
    )
    columns: dict[str, Literal["string", "int64", "float64", "bool"]] = Field(
        default_factory=dict,
        description="Columns to take, with their types; null where the table does not have the id.",
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Catalog(Section):
    """What is known of the catalogue beside its images."""

    metadata: CatalogMetadata = CatalogMetadata()
