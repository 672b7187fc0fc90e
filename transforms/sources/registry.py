"""The formats that `images.sources` may name.

A new format is one module with a subclass of ImageSource, and one member of this union.
"""

from typing import Annotated, get_args

from pydantic import Field

from transforms.sources.files import FilesSource
from transforms.sources.parquet import ParquetSource
from transforms.sources.table import TableSource
from transforms.sources.tfrecord import TFRecordSource
from transforms.sources.webdataset import WebDatasetSource

AnySource = Annotated[
    TFRecordSource | FilesSource | WebDatasetSource | ParquetSource | TableSource,
    Field(discriminator="format"),
]

FORMATS = frozenset(
    get_args(source.model_fields["format"].annotation)[0] for source in get_args(get_args(AnySource)[0])
)
