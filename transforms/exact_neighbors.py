"""Exact neighbours of a sample of queries in a whole dataset: parts draw, then parts search."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsIter, AsSideInput
from apache_beam.typehints import no_annotations


class FoundNeighbors(NamedTuple):
    """One table each: the queries that were drawn, and their neighbours; none where none was drawn."""

    queries: beam.PCollection[pa.Table]
    neighbors: beam.PCollection[pa.Table]


@dataclasses.dataclass
class FindExactNeighbors(beam.PTransform):
    """Draws queries from every part of a dataset and searches for them in every part.

    Input: the pipeline's root. Output: FoundNeighbors. `draw(number, after)` returns the candidates of
    a part (None: nothing is to be done), `search(number, queries, after)` what it has for all queries;
    `choose` and `merge` make one table of several, in stages and in any order; `complete` adds to the
    queries, once they are chosen, what no part could. `after` is a side input that both wait for. Only
    the sample and k rows a query travel.
    """

    parts: int
    draw: Callable[[int, Any], pa.Table | None]
    choose: Callable[[Iterable[pa.Table]], pa.Table]
    search: Callable[[int, pa.Table, Any], pa.Table]
    merge: Callable[[Iterable[pa.Table]], pa.Table]
    after: AsSideInput
    complete: Callable[[pa.Table], pa.Table] | None = None

    # Beam's type hints know no named tuple of collections.
    @no_annotations
    def expand(self, root: beam.Pipeline) -> FoundNeighbors:
        """Adds: draw, choose, search, merge."""
        queries = (
            root
            | "ListDrawnParts" >> beam.Create(range(self.parts))
            | "SpreadDrawnParts" >> beam.Reshuffle()
            | "DrawQueries" >> beam.FlatMap(self._draw, self.after)
            | "ChooseQueries" >> beam.CombineGlobally(self.choose).without_defaults()
        )
        if self.complete is not None:
            queries = queries | "CompleteQueries" >> beam.Map(self.complete)
        neighbors = (
            root
            | "ListSearchedParts" >> beam.Create(range(self.parts))
            | "SpreadSearchedParts" >> beam.Reshuffle()
            | "SearchPart" >> beam.FlatMap(self._search, AsIter(queries), self.after)
            | "MergeNeighbors" >> beam.CombineGlobally(self.merge).without_defaults()
        )
        return FoundNeighbors(queries, neighbors)

    def _draw(self, number: int, after: Any) -> list[pa.Table]:
        table = self.draw(number, after)
        return [] if table is None else [table]

    def _search(self, number: int, queries: Iterable[pa.Table], after: Any) -> list[pa.Table]:
        return [self.search(number, table, after) for table in queries]


def one_table(tables: Iterable[pa.Table]) -> pa.Table:
    """Returns the one table of FoundNeighbors. Raises ValueError where there is none, or more."""
    (table,) = tables
    return table
