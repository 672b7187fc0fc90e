"""Building the index: check, train once, assign by part, plan the layout, write shard by shard.

The steps are those of `index_builder.steps.building`. Between them only small descriptors travel.
Vectors move through scratch files in the index's `_work` folder, sorted by list, of which each shard
reads the lists that it owns.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import AsIter, AsSingleton
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from index_builder.datasets.manifests import Part
from index_builder.index.training import TrainedIndex, load_trained
from index_builder.recall import calibration
from index_builder.recall.query_sample import choose_queries
from index_builder.steps import building, index_manifest, nprobe_choice
from index_builder.steps.build_spec import REVISION, BuildSpec
from index_builder.steps.corpus_check import PartFindings
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.exact_neighbors import FindExactNeighbors, one_table

__all__ = ["REVISION", "STAGE", "BuildIndex", "BuildSpec"]

STAGE = "build"


@dataclasses.dataclass
class BuildIndex(beam.PTransform):
    """Builds the index shards.

    Input: the pipeline's root. Output: the Part of every index shard, and the part that holds what
    all shards share. After an interrupted run, finished steps and shards are kept.
    """

    spec: BuildSpec

    def expand(self, root: beam.Pipeline) -> beam.PCollection[Part]:
        """Adds: check, train, assign, plan, build."""
        shared = Shared()
        numbers = range(len(self.spec.embeddings_parts))
        findings = (
            root
            | "ListCorpus" >> beam.Create(numbers)
            | "SpreadCorpus" >> beam.Reshuffle()
            | "CheckPart" >> beam.Map(_check, self.spec)
        )
        trained = (
            root
            | "OneTask" >> beam.Create([self.spec])
            | "JudgeCorpus" >> beam.Map(_judge, AsIter(findings))
            | "Train" >> beam.Map(_train)
        )
        ready = trained
        if self.spec.calibration is not None and self.spec.retry is None:
            ready = trained | "CalibrateNprobe" >> _CalibrateNprobe(self.spec, shared)
        sizes = (
            root
            | "ListParts" >> beam.Create(numbers)
            | "SpreadParts" >> beam.Reshuffle()
            | "AssignPart" >> beam.ParDo(_AssignPart(self.spec, shared), AsSingleton(ready))
            | "SumListSizes" >> beam.CombineGlobally(sum_list_sizes).without_defaults()
        )
        plans = sizes | "PlanLayout" >> beam.FlatMap(_plan, self.spec)
        built = (
            plans
            | "SpreadShards" >> beam.Reshuffle()
            | "BuildShard" >> beam.ParDo(_BuildShard(self.spec, shared))
        )
        finished = sizes | "DescribeShared" >> beam.Map(
            index_manifest.describe_shared, self.spec, AsIter(built)
        )
        return (built, finished) | "AllParts" >> beam.Flatten()


def _check(number: int, spec: BuildSpec) -> PartFindings | None:
    with timed(STAGE):
        return building.check(spec, number, functools.partial(count, STAGE))


def _judge(spec: BuildSpec, findings: Iterable[PartFindings | None]) -> BuildSpec:
    """Refuses a corpus that cannot be indexed, before anything is made of it."""
    building.judge(spec, findings)
    return spec


def _train(spec: BuildSpec) -> str:
    with timed(STAGE):
        return building.train(spec, functools.partial(count, STAGE))


class _WithTrained(beam.DoFn):
    """A step that shares the trained quantizer between all threads of a process."""

    def __init__(self, spec: BuildSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared

    def trained(self) -> TrainedIndex:
        path = self._spec.trained_path
        trained: TrainedIndex = self._shared.acquire(lambda: load_trained(path), tag=path)
        return trained


@dataclasses.dataclass
class _CalibrateNprobe(beam.PTransform):
    """Chooses nprobe on a sample of the corpus's own queries, unless an earlier attempt did.

    Input and output: the path of what was trained. No vector but those of the sample travels.
    """

    spec: BuildSpec
    shared: Shared

    def expand(self, trained: beam.PCollection[str]) -> beam.PCollection[str]:
        """Adds: draw the sample, find its exact neighbours, choose."""
        spec = self.spec
        assert spec.calibration is not None, "added only where nprobe is calibrated"
        found = trained.pipeline | "FindExactNeighbors" >> FindExactNeighbors(
            len(spec.embeddings_parts),
            functools.partial(_draw_queries, spec),
            functools.partial(choose_queries, sample=spec.calibration_sample),
            _SearchPart(spec, self.shared),
            functools.partial(calibration.merge_found, corpus=spec.corpus, spec=spec.calibration),
            AsSingleton(trained),
            functools.partial(_add_excluded, spec),
        )
        choose = beam.ParDo(
            _ChooseNprobe(spec, self.shared), AsIter(found.queries), AsIter(found.neighbors)
        )
        return trained | "ChooseNprobe" >> choose


def _draw_queries(spec: BuildSpec, number: int, trained_path: str) -> pa.Table | None:
    if not nprobe_choice.calibrates(spec):
        return None
    with timed(STAGE):
        return nprobe_choice.draw_queries(spec, number)


def _add_excluded(spec: BuildSpec, queries: pa.Table) -> pa.Table:
    with timed(STAGE):
        return nprobe_choice.add_excluded(spec, queries)


class _SearchPart(_WithTrained):
    """Finds the exact neighbours of the sample in one part of the embeddings."""

    def __call__(self, number: int, queries: pa.Table, trained_path: str) -> pa.Table:
        trained = self.trained()
        with timed(STAGE):
            found = nprobe_choice.search_part(self._spec, number, queries, trained)
        count(STAGE, "vectors_searched", self._spec.embeddings_parts[number].rows)
        return found


class _ChooseNprobe(_WithTrained):
    def process(
        self, trained_path: str, queries: Iterable[pa.Table], found: Iterable[pa.Table]
    ) -> Iterator[str]:
        """Passes the path on once nprobe is settled and fits into memory."""
        trained = self.trained()
        if nprobe_choice.calibrates(self._spec):
            with timed(STAGE):
                nprobe_choice.choose_nprobe(self._spec, one_table(queries), one_table(found), trained)
        nprobe_choice.check_memory(self._spec, trained.nlist)
        yield trained_path


class _AssignPart(_WithTrained):
    def process(self, number: int, trained_path: str) -> Iterator[NDArray[np.int64]]:
        """Yields the list sizes of one part; the side input makes it wait for training."""
        trained = self.trained()
        with timed(STAGE):
            sizes = building.assign(self._spec, number, trained, functools.partial(count, STAGE))
        yield sizes


def sum_list_sizes(blocks: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Adds up how many rows each list has, int64 [nlist], over blocks of rows."""
    total: NDArray[np.int64] = np.sum(list(blocks), axis=0, dtype=np.int64)
    return total


def _plan(list_sizes: NDArray[np.int64], spec: BuildSpec) -> Iterator[int]:
    """Writes the layout and yields the numbers of the shards."""
    yield from range(building.plan(spec, list_sizes).shards)


class _BuildShard(_WithTrained):
    def process(self, shard: int) -> Iterator[Part]:
        """Yields the shard's part."""
        trained = self.trained()
        with timed(STAGE):
            part = building.build(self._spec, shard, trained, functools.partial(count, STAGE))
        LOCAL_PROGRESS.add(part.rows)
        yield part
