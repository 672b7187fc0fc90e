"""The failures dataset: one row for every image that could not be embedded, and why."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.datasets import storage

KIND = "failures"
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("source_shard", pa.string(), nullable=False),
        pa.field("row", pa.int64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
    ]
)

# The reason of a stretch of a container that cannot be read; it is no image, so the books of images
# leave it out.
UNREADABLE_REGION = "unreadable_region"


@dataclasses.dataclass(frozen=True)
class Failure:
    """One row: where the image was, the stage that gave up, a short stable code and the text.

    `offset` is for an unreadable region: the byte of the container at which it begins.
    """

    image_id: str | None
    source_shard: str
    row: int | None
    stage: str
    reason: str
    error: str
    offset: int | None = None


def write_failures(path: str, failures: Sequence[Failure]) -> None:
    """Writes the failures of one shard as a Parquet file, also when there are none."""
    rows = [dataclasses.asdict(failure) for failure in failures]
    with storage.atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def count_reasons(failures: Sequence[Failure]) -> dict[str, int]:
    """Counts failed images by reason, in alphabetical order; unreadable regions are left out."""
    counts = Counter(f.reason for f in failures if f.reason != UNREADABLE_REGION)
    return dict(sorted(counts.items()))
