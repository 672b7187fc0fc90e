"""Making queries: assign part by part to the lists of an index, plan the layout, write query shards.

The steps are those of `index_builder.steps.queries`; between them only list sizes and shard numbers
travel.
"""

import dataclasses
import functools
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from index_builder.datasets.manifests import Part
from index_builder.index.shards import IndexDataset, open_index
from index_builder.steps import queries
from index_builder.steps.queries import QueriesSpec
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.index import sum_list_sizes

STAGE = "queries"


@dataclasses.dataclass
class MakeQueries(beam.PTransform):
    """Writes the query shards of an embeddings dataset for one index.

    Input: the pipeline's root. Output: the Part of every query shard. After an interrupted run,
    finished parts and shards are kept.
    """

    spec: QueriesSpec

    def expand(self, root: beam.Pipeline) -> beam.PCollection[Part]:
        """Adds: assign, plan, build."""
        shared = Shared()
        return (
            root
            | "ListParts" >> beam.Create(range(len(self.spec.embeddings_parts)))
            | "SpreadParts" >> beam.Reshuffle()
            | "AssignPart" >> beam.ParDo(_AssignPart(self.spec, shared))
            | "SumListSizes" >> beam.CombineGlobally(sum_list_sizes).without_defaults()
            | "PlanLayout" >> beam.FlatMap(_plan, self.spec)
            | "SpreadShards" >> beam.Reshuffle()
            | "BuildShard" >> beam.ParDo(_BuildShard(self.spec, shared))
        )


class _WithIndex(beam.DoFn):
    """A step that shares the opened index between all threads of a process."""

    def __init__(self, spec: QueriesSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared

    def index(self) -> IndexDataset:
        folder = self._spec.index_folder
        index: IndexDataset = self._shared.acquire(lambda: open_index(folder), tag=folder)
        return index


class _AssignPart(_WithIndex):
    def process(self, number: int) -> Iterator[NDArray[np.int64]]:
        """Yields the list sizes of one part."""
        index = self.index()
        with timed(STAGE):
            sizes = queries.assign(self._spec, number, index, functools.partial(count, STAGE))
        yield sizes


def _plan(list_sizes: NDArray[np.int64], spec: QueriesSpec) -> Iterator[int]:
    """Writes the layout and yields the numbers of the shards."""
    yield from range(queries.plan(spec, list_sizes).shards)


class _BuildShard(_WithIndex):
    def process(self, shard: int) -> Iterator[Part]:
        """Yields the shard's part."""
        index = self.index()
        with timed(STAGE):
            part = queries.build(self._spec, shard, index, functools.partial(count, STAGE))
        LOCAL_PROGRESS.add(part.rows)
        yield part
