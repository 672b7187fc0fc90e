"""Evaluation: recall on a sample, hits on known right answers, and examples for people."""

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import AsIter, AsSingleton

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Part
from index_builder.index.shards import IndexDataset, open_index
from index_builder.recall import evaluation
from index_builder.recall.evaluation import Measured, TruthHits, in_sample_order, searchable
from index_builder.recall.query_sample import QuerySample, choose_queries
from index_builder.recall.recall import Promise
from index_builder.scoring.metrics import Metric
from index_builder.search.corpus import Corpus
from index_builder.search.exact_search import merge_found
from index_builder.search.join import JoinSpec, open_joined
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.exact_neighbors import FindExactNeighbors, one_table
from transforms.score_histogram import ScoreHistogram

KIND = "evaluation"
STAGE = "evaluate"
# Raised when the same neighbours and configuration give other figures than before.
REVISION = 3
PART_NAME = "evaluation"
FILE_NAME = "evaluation.json"

KINDS = ("best", "typical", "worst")
_SHOWN_NEIGHBORS = 10
_MOST_GROUPS_SHOWN = 24
_SCORE_UNITS = 2**40


@dataclasses.dataclass(frozen=True)
class EvaluateSpec:
    """What is measured.

    `promise` is what is certified of the recall, on attempt `attempt`, and by the values of the column
    `recall_by`; `truth` names the column whose equal values are right answers, counted among the first
    `truth_k` neighbours; `group_by` the column that figures and examples are listed by; `examples` of
    each kind a group; `columns` are shown with them. `metric` is that of the index.
    """

    promise: Promise = dataclasses.field(default_factory=Promise)
    truth: str | None = None
    truth_k: int = 10
    group_by: str | None = None
    examples: int = 3
    columns: tuple[str, ...] = ()
    recall_by: str | None = None
    attempt: int = 1
    metric: str = Metric.COSINE.value


@dataclasses.dataclass
class EvaluateNeighbors(beam.PTransform):
    """Measures a neighbours dataset and writes `evaluation.json`.

    Input: the pipeline's root. Output: the one Part of the evaluation dataset. With `corpus`, the
    embeddings that the index was made of, recall is also measured in the encoder's own space. What an
    earlier, interrupted attempt finished is kept.
    """

    index_folder: str
    neighbors_folder: str
    parts: tuple[Part, ...]
    join: JoinSpec
    spec: EvaluateSpec
    evaluation_folder: str
    key: str
    corpus: Corpus | None = None

    def expand(self, root: beam.Pipeline) -> beam.PCollection[Part]:
        """Adds the branches, recall and statistics, and the step that writes all."""
        finished = manifests.finished_part(self.evaluation_folder, PART_NAME, self.key)
        if finished is not None:
            return root | "Finished" >> beam.Create([finished])
        summary = (
            root
            | "ListParts" >> beam.Create(self.parts)
            | "SpreadParts" >> beam.Reshuffle()
            | "SummarizePart" >> beam.Map(self._summarize)
            | "Merge" >> beam.CombineGlobally(_Merge(self.spec))
        )
        found = root | "FindIndexNeighbors" >> FindExactNeighbors(
            len(self.parts),
            self._draw,
            functools.partial(choose_queries, sample=self._sample()),
            self._search,
            functools.partial(merge_found, k=self.join.k, rules=self.join.rules),
            AsIter(root | "NothingBefore" >> beam.Create([])),
        )
        measured = found.queries | "CompareWithJoin" >> beam.Map(
            self._compare, AsSingleton(found.neighbors)
        )
        encoder = root | "NoEncoderSpace" >> beam.Create([(None, 0)])
        if self.corpus is not None:
            space = root | "FindEncoderNeighbors" >> FindExactNeighbors(
                len(self.corpus.parts),
                self._read_encoder,
                in_sample_order,
                self._search_encoder,
                functools.partial(
                    merge_found, k=self.join.k, rules=searchable(self.corpus, self.join.rules)
                ),
                AsSingleton(found.queries),
            )
            encoder = measured | "CompareWithEncoder" >> beam.Map(
                _encoder_recall, AsIter(space.queries), AsIter(space.neighbors)
            )
        return summary | "WriteEvaluation" >> beam.Map(
            self._write, AsSingleton(measured), AsSingleton(encoder)
        )

    def _index(self) -> IndexDataset:
        return open_joined(self.index_folder, self.join)

    def _sample(self) -> QuerySample:
        index = open_index(self.index_folder)
        return evaluation.certificate_sample(index, self.spec.promise, self.spec.attempt)

    def _draw(self, number: int, after: Any) -> pa.Table:
        with timed(STAGE):
            return evaluation.draw_queries(
                self._index(), number, self.join, self._sample(), self.spec.recall_by
            )

    def _search(self, number: int, queries: pa.Table, after: Any) -> pa.Table:
        with timed(STAGE):
            return evaluation.search_exactly(self._index(), number, queries, self.join)

    def _compare(self, queries: pa.Table, exact: pa.Table) -> Measured:
        count(STAGE, "recall_queries", len(queries))
        with timed(STAGE):
            return evaluation.compare_with_join(queries, exact, self.neighbors_folder, self.parts)

    def _read_encoder(self, number: int, sample: pa.Table) -> pa.Table:
        assert self.corpus is not None
        with timed(STAGE):
            return evaluation.read_encoder_queries(self.corpus, number, sample, self.join)

    def _search_encoder(self, number: int, queries: pa.Table, after: Any) -> pa.Table:
        assert self.corpus is not None
        transform = open_index(self.index_folder).trained.transform
        with timed(STAGE):
            return evaluation.search_encoder_space(self.corpus, number, queries, self.join, transform)

    def _summarize(self, part: Part) -> "Summary":
        with timed(STAGE):
            summary = Summary()
            for block in embeddings.read_part(self.neighbors_folder, part):
                summary.add(block, self.spec)
        count(STAGE, "queries", part.rows)
        LOCAL_PROGRESS.add(part.rows)
        return summary

    def _write(self, summary: "Summary", measured: Measured, encoder: tuple[float | None, int]) -> Part:
        spec = self.spec
        certificate = evaluation.certify(
            measured,
            open_index(self.index_folder),
            self.join.k,
            spec.promise,
            spec.attempt,
            spec.recall_by,
            None if spec.recall_by is None else summary.values,
            encoder,
        )
        document = summary.document(spec) | {"recall": certificate.to_json()}
        storage.write_json(storage.join(self.evaluation_folder, FILE_NAME), document)
        file = manifests.describe_file(self.evaluation_folder, FILE_NAME)
        part = Part(PART_NAME, self.key, 1, (file,))
        manifests.mark_part(self.evaluation_folder, part)
        return part


def _encoder_recall(
    measured: Measured, queries: Iterable[pa.Table], exact: Iterable[pa.Table]
) -> tuple[float | None, int]:
    table = one_table(queries)
    return evaluation.encoder_recall(table, one_table(exact), measured), len(table)


@dataclasses.dataclass
class GroupFigures:
    """Sums over the queries of one group; hits are counted among queries with a truth value.

    `top_score_sum` is in units of 2^-40, a whole number, so that it does not depend on the order.
    """

    queries: int = 0
    top_score_sum: int = 0
    hits_at_1: int = 0
    hits_at_k: int = 0

    def merge(self, other: "GroupFigures") -> None:
        """Adds the sums of another part of the same group."""
        self.queries += other.queries
        self.top_score_sum += other.top_score_sum
        self.hits_at_1 += other.hits_at_1
        self.hits_at_k += other.hits_at_k


class Summary:
    """What one pass over neighbours leaves: sums, a histogram, and a few examples of each kind.

    Memory: bounded by the number of distinct groups and truth values, not by the queries.
    """

    def __init__(self) -> None:
        self.groups: dict[str | None, GroupFigures] = {}
        self.truths: Counter[tuple[str | None, Any]] = Counter()
        self.values: Counter[str | None] = Counter()
        self.histogram = ScoreHistogram()
        self.examples: dict[tuple[str | None, str], list[tuple[Any, dict[str, Any]]]] = {}

    def add(self, block: pa.Table, spec: EvaluateSpec) -> None:
        """Adds a block of the neighbours dataset."""
        if spec.recall_by is not None:
            self.values.update(block[f"query_{spec.recall_by}"].cast(pa.string()).to_pylist())
        tops = np.array([s[0] if s else np.nan for s in block["scores"].to_pylist()])
        self.histogram.add(tops[~np.isnan(tops)], Metric(spec.metric))
        ranks = np.zeros(len(block), dtype=np.int64)
        truths: list[Any] = [None] * len(block)
        if spec.truth is not None:
            ranks = evaluation.truth_ranks(block, spec.truth)
            truths = block[f"query_{spec.truth}"].to_pylist()
        groups: list[Any] = [None] * len(block)
        if spec.group_by is not None:
            groups = block[f"query_{spec.group_by}"].cast(pa.string()).to_pylist()
        best: dict[tuple[str | None, str], list[tuple[Any, int]]] = {}
        ids = block["query_id"].to_pylist()
        for i, (group, rank, top) in enumerate(zip(groups, ranks, tops, strict=True)):
            figures = self.groups.setdefault(group, GroupFigures())
            figures.queries += 1
            figures.top_score_sum += 0 if np.isnan(top) else round(float(top) * _SCORE_UNITS)
            figures.hits_at_1 += int(rank == 1)
            figures.hits_at_k += int(0 < rank <= spec.truth_k)
            if truths[i] is not None:
                self.truths[group, truths[i]] += 1
            for kind, key in _example_keys(ids[i], int(rank), float(np.nan_to_num(top)), spec):
                best.setdefault((group, kind), []).append((key, i))
        for place, candidates in best.items():
            chosen = sorted(candidates)[: spec.examples]
            examples = [(key, _example(block, i, place, spec)) for key, i in chosen]
            self._keep(place, examples, spec.examples)

    def merge(self, other: "Summary", most: int) -> None:
        """Adds what was found in other parts."""
        for group, figures in other.groups.items():
            self.groups.setdefault(group, GroupFigures()).merge(figures)
        self.truths.update(other.truths)
        self.values.update(other.values)
        self.histogram.merge(other.histogram)
        for place, examples in other.examples.items():
            self._keep(place, examples, most)

    def _keep(self, place: tuple[str | None, str], more: list[Any], most: int) -> None:
        both = self.examples.get(place, []) + more
        self.examples[place] = sorted(both, key=lambda example: example[0])[:most]

    def document(self, spec: EvaluateSpec) -> dict[str, Any]:
        """Returns the figures as plain JSON values."""
        by_value: Counter[Any] = Counter()
        for (_, value), number in self.truths.items():
            by_value[value] += number
        # A query whose value is its own alone has no right answer to find.
        answerable: Counter[str | None] = Counter()
        for (group, value), number in self.truths.items():
            if by_value[value] > 1:
                answerable[group] += number
        names = sorted(self.groups, key=lambda g: (-self.groups[g].queries, g is None, g or ""))
        shown = names[:_MOST_GROUPS_SHOWN]
        return {
            "truth": self._truth(spec, sum(answerable.values())),
            "group_by": spec.group_by,
            "groups": [
                _group_document(name, self.groups[name], answerable[name], spec) for name in shown
            ],
            "scores": self.histogram.document(Metric(spec.metric)),
            "examples": [
                example
                for name in shown
                for kind in KINDS
                for _, example in self.examples.get((name, kind), [])
            ],
        }

    def _truth(self, spec: EvaluateSpec, queries: int) -> dict[str, Any] | None:
        if spec.truth is None:
            return None
        hits = TruthHits(
            queries,
            sum(figures.hits_at_1 for figures in self.groups.values()),
            sum(figures.hits_at_k for figures in self.groups.values()),
            spec.truth_k,
        )
        return {
            "column": spec.truth,
            "queries": queries,
            "hit_rate_at_1": hits.rate_at_1,
            "hit_rate_at_k": hits.rate_at_k,
            "k": spec.truth_k,
        }


def _group_document(
    name: str | None, figures: GroupFigures, answerable: int, spec: EvaluateSpec
) -> dict[str, Any]:
    hits = TruthHits(answerable, figures.hits_at_1, figures.hits_at_k, spec.truth_k)
    known = spec.truth is not None and answerable > 0
    return {
        "name": name,
        "queries": figures.queries,
        "mean_top_score": figures.top_score_sum / _SCORE_UNITS / figures.queries,
        "hit_rate_at_1": hits.rate_at_1 if known else None,
        "hit_rate_at_k": hits.rate_at_k if known else None,
    }


def _example_keys(
    query_id: str, rank: int, top: float, spec: EvaluateSpec
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields, for each kind of example, what queries are ordered by: the first are kept."""
    missed = spec.truth is not None and not 0 < rank <= spec.truth_k
    yield "best", (missed, rank, -top, query_id)
    yield "typical", (zlib.crc32(query_id.encode()), query_id)
    yield "worst", (not missed, top, query_id)


def _example(
    block: pa.Table, i: int, place: tuple[str | None, str], spec: EvaluateSpec
) -> dict[str, Any]:
    row = block.slice(i, 1).to_pylist()[0]
    names = spec.columns
    neighbors = []
    for j, image_id in enumerate(row["neighbor_ids"][:_SHOWN_NEIGHBORS]):
        truth = None if spec.truth is None else row[f"query_{spec.truth}"]
        right = None if truth is None else row[f"neighbor_{spec.truth}"][j] == truth
        neighbors.append(
            {
                "image_id": image_id,
                "row": row["neighbor_rows"][j],
                "score": row["scores"][j],
                "right": right,
                "columns": {name: row[f"neighbor_{name}"][j] for name in names},
            }
        )
    group, kind = place
    return {
        "group": group,
        "kind": kind,
        "query": {
            "image_id": row["query_id"],
            "row": row["query_row"],
            "columns": {name: row[f"query_{name}"] for name in names},
        },
        "neighbors": neighbors,
    }


class _Merge(beam.CombineFn):
    """Merges summaries; the result does not depend on the order of the parts."""

    def __init__(self, spec: EvaluateSpec) -> None:
        self._spec = spec

    def create_accumulator(self) -> Summary:
        return Summary()

    def add_input(self, accumulator: Summary, summary: Summary) -> Summary:
        accumulator.merge(summary, self._spec.examples)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[Summary]) -> Summary:
        merged = Summary()
        for accumulator in accumulators:
            merged.merge(accumulator, self._spec.examples)
        return merged

    def extract_output(self, accumulator: Summary) -> Summary:
        return accumulator
