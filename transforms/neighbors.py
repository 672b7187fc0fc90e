"""The join as Beam sees it: one element is the number of a query shard."""

import dataclasses
import functools
from collections.abc import Iterator

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsSingleton

from index_builder.datasets.manifests import Part
from index_builder.index.shards import open_index
from index_builder.search.join import open_joined
from index_builder.search.short_rows import count_candidates, merge_counts, needs_counts
from index_builder.steps.joining import REVISION, JoinTask, finish_part, first_pass, part_name
from transforms.counters import LOCAL_PROGRESS, count, timed

__all__ = ["REVISION", "STAGE", "JoinNeighbors", "JoinTask", "part_name"]

STAGE = "join"


@dataclasses.dataclass
class JoinNeighbors(beam.PTransform):
    """Finds the neighbours of every query.

    Input: int, the number of a query shard. Output: the Part of the neighbours dataset that the
    tasks wrote or, after an interrupted run, had written. A shard is searched by one task; where it
    has rows with too few neighbours, a second task settles them and writes the part.
    """

    task: JoinTask

    def expand(self, shards: beam.PCollection[int]) -> beam.PCollection[Part]:
        """Adds the two steps and, where the rules need it, a count of the candidates."""
        searched = (
            shards
            | "JoinShard" >> beam.ParDo(_JoinShard(self.task))
            | "SpreadShortRows" >> beam.Reshuffle()
        )
        widen = _WidenShard(self.task)
        if not needs_counts(self.task.spec.rules):
            return searched | "WidenShard" >> beam.ParDo(widen, None)
        counts = (
            shards.pipeline
            | "TheIndex" >> beam.Create([self.task.index_folder])
            | "ListIndexShards" >> beam.FlatMap(lambda path: range(open_index(path).layout.shards))
            | "SpreadIndexShards" >> beam.Reshuffle()
            | "CountCandidates" >> beam.Map(self._count)
            | "SumCounts" >> beam.CombineGlobally(merge_counts).without_defaults()
        )
        return searched | "WidenShard" >> beam.ParDo(widen, AsSingleton(counts))

    def _count(self, number: int) -> pa.Table:
        with timed(STAGE):
            index = open_joined(self.task.index_folder, self.task.spec)
            return count_candidates(index, number, self.task.spec.rules)


class _JoinShard(beam.DoFn):
    def __init__(self, task: JoinTask) -> None:
        self._task = task

    def process(self, shard: int) -> Iterator[int]:
        with timed(STAGE):
            yield first_pass(self._task, shard, functools.partial(count, STAGE))


class _WidenShard(beam.DoFn):
    def __init__(self, task: JoinTask) -> None:
        self._task = task

    def process(self, shard: int, counts: pa.Table | None) -> Iterator[Part]:
        with timed(STAGE):
            part = finish_part(self._task, shard, counts, functools.partial(count, STAGE))
        LOCAL_PROGRESS.add(part.rows)
        yield part
