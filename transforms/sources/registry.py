"""The formats that `images.sources` may name.

A new format is one module with a subclass of ImageSource, and one member of this union.
"""

from typing import Annotated

from pydantic import Field

from transforms.sources.files import FilesSource
from transforms.sources.tfrecord import TFRecordSource

AnySource = Annotated[TFRecordSource | FilesSource, Field(discriminator="format")]
