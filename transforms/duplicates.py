"""Finding image ids that occur more than once, by a shuffle of ids alone.

Elements are blocks: every part sends, for each bucket of the hash of the id, one Arrow block of ids
with their locations. Rows never travel one by one, vectors not at all.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index_builder.datasets import embeddings, storage
from index_builder.datasets.manifests import Part

# The same for every dataset, whatever it allows to be null.
_SCHEMA = pa.schema([("image_id", pa.string()), ("source_shard", pa.string()), ("row", pa.int64())])
# Duplicates listed for people by one bucket; all are counted.
MOST_LISTED = 20


@dataclasses.dataclass(frozen=True)
class IdPart:
    """One element: a part of a dataset with the columns image_id, source_shard and row."""

    folder: str
    part: Part


@dataclasses.dataclass
class FindDuplicateIds(beam.PTransform):
    """Writes one JSON file for each bucket that holds duplicates, and none where all is well.

    Input: IdPart. Output: the paths of the files, each with `count` of the ids that occur more than
    once and the first of them with their locations. Null ids are no ids and are left out.
    """

    folder: str
    buckets: int = 16

    def expand(self, parts: beam.PCollection[IdPart]) -> beam.PCollection[str]:
        """Adds: split by bucket, group, compare."""
        return (
            parts
            | "SplitIds" >> beam.FlatMap(split_ids, self.buckets)
            | "GroupByBucket" >> beam.GroupByKey()
            | "FindInBucket" >> beam.FlatMap(_write_duplicates, self.folder)
        )


def split_ids(element: IdPart, buckets: int) -> Iterator[tuple[int, bytes]]:
    """Yields (bucket, Arrow IPC block of ids and locations) of one part."""
    for block in embeddings.read_part(element.folder, element.part, _SCHEMA.names):
        table = block.select(_SCHEMA.names).cast(_SCHEMA)
        table = table.filter(table["image_id"].is_valid())
        ids = table["image_id"].to_pylist()
        bucket_of = np.array([zlib.crc32(i.encode()) % buckets for i in ids], dtype=np.int64)
        for bucket in np.unique(bucket_of):
            yield int(bucket), _to_ipc(table.filter(pa.array(bucket_of == bucket)))


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def find_duplicates(blocks: Iterable[bytes]) -> dict[str, list[str]]:
    """Returns the ids that occur more than once, sorted, each with its locations, sorted."""
    table = pa.concat_tables([pa.ipc.open_stream(block).read_all() for block in blocks])
    groups = table.group_by("image_id").aggregate([("image_id", "count")])
    repeated = groups.filter(pc.greater(groups["image_id_count"], 1))["image_id"]
    rows = table.filter(pc.is_in(table["image_id"], value_set=repeated.combine_chunks()))
    found: dict[str, list[str]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["image_id"], []).append(f"{row['source_shard']} row {row['row']}")
    return {image_id: sorted(found[image_id]) for image_id in sorted(found)}


def _write_duplicates(element: tuple[int, Iterable[bytes]], folder: str) -> Iterator[str]:
    bucket, blocks = element
    found = find_duplicates(blocks)
    if found:
        path = storage.join(folder, f"bucket-{bucket:05d}.json")
        listed = dict(list(found.items())[:MOST_LISTED])
        storage.write_json(path, {"count": len(found), "ids": listed})
        yield path
