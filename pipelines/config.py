"""The configuration as a model: all its sections, and what stages take from them.

The sections' field descriptions are the configuration reference (`docs/configuration.md` is made from
them).
"""

import dataclasses

from pydantic import Field

from index_builder.datasets.table_files import TableSpec
from index_builder.index.goals import Encoding, Goal, TransformSpec
from index_builder.index.spec import IndexSpec
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.recall import Promise
from index_builder.rules.rules import OWN_ITEM
from index_builder.scoring.metrics import Metric
from index_builder.search.join import JoinSpec
from index_builder.steps.graph import GraphSpec
from index_builder.steps.pairs import PairSpec
from pipelines.sections.base import Section
from pipelines.sections.catalogue import Catalog, Images
from pipelines.sections.encoder import Embeddings, Encoder
from pipelines.sections.index import Duplicates, Index
from pipelines.sections.join import Join
from pipelines.sections.results import Evaluate, Export, Graph, Nightly
from transforms.decoding import DecodePolicy
from transforms.embed import EmbedSpec
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import resolve_input_size
from transforms.evaluate import EvaluateSpec
from transforms.exports import ExportSpec
from transforms.item_rows import ItemRows
from transforms.locations import Location
from transforms.prepare import Preparation
from transforms.preprocessing import Preprocessing

EIGEN_POWER = {"none": 0.0, "half": -0.25, "full": -0.5}


class Config(Section):
    """One run of Kith, from images to published recommendations."""

    runner: str = Field(
        "DirectRunner",
        description="A Beam runner. `DirectRunner` is Beam's own in-process runner, pinned.",
    )
    workspace: Location = Field(description="Folder of all datasets and runs, local or `gs://`.")
    images: Images = Images()
    catalog: Catalog = Catalog()
    encoder: Encoder = Encoder()
    embeddings: Embeddings = Embeddings()
    index: Index = Index()
    duplicates: Duplicates = Duplicates()
    join: Join = Join()
    evaluate: Evaluate = Evaluate()
    graph: Graph = Graph()
    export: Export = Export()
    nightly: Nightly = Nightly()

    def preparation(self) -> Preparation:
        """Returns what decides which pixels the encoder sees. May open a SavedModel for its size."""
        images, encoder = self.images, self.encoder
        return Preparation(
            DecodePolicy(
                images.max_pixels, images.truncated, images.scaled_decoding, images.dicom_frame
            ),
            Preprocessing(
                resolve_input_size(self.encoder_spec()), encoder.resize, encoder.interpolation
            ),
        )

    def embed_spec(self, choice: EngineChoice) -> EmbedSpec:
        """Returns what decides about embeddings, on an engine that has been settled."""
        return EmbedSpec(
            self.images.sources,
            tuple(self.images.metadata.items()),
            self.preparation(),
            self.encoder_spec(),
            choice,
            self.encoder.batch_size,
            self.encoder.decode_threads,
            self.images.decode_timeout_sec,
            self.embeddings.normalize,
        )

    def encoder_spec(self) -> EncoderSpec:
        """Returns the encoder as the registry takes it."""
        section = self.encoder
        return EncoderSpec(
            section.name,
            section.weights,
            section.pooling,
            section.seed,
            section.input_size,
            section.preprocessing,
        )

    def table_spec(self) -> TableSpec | None:
        """Returns the metadata table as asked for, or None where there is none."""
        section = self.catalog.metadata
        if not section.paths:
            return None
        columns = tuple(section.columns.items())
        return TableSpec(section.paths, section.key, section.id_column or section.key, columns)

    def index_spec(self) -> IndexSpec:
        """Returns the index as asked for."""
        section = self.index
        transform = TransformSpec(
            section.transform.type, section.transform.dim, EIGEN_POWER[section.transform.whitening]
        )
        return IndexSpec(
            Metric(section.metric),
            transform,
            section.nlist,
            section.nprobe,
            section.shards,
            section.training_rows,
            section.seed,
            None if section.encoding is None else Encoding(section.encoding),
            section.refine,
        )

    def goal(self) -> Goal:
        """Returns what the choices that are left to Kith aim at."""
        limit = int(self.index.memory_limit_gib * 2**30)
        return Goal(self.join.k, self.evaluate.min_recall, limit)

    def join_spec(self) -> JoinSpec:
        """Returns the join; it carries every column that a later stage needs.

        Exclusions are files: `join_exclusions.settle_join` adds them.
        """
        evaluate = [self.evaluate.truth, self.evaluate.group_by, self.evaluate.recall_by]
        wanted = [*self.export.columns, *(name for name in evaluate if name)]
        join = self.join
        if self.export.by == "item":
            wanted += [OWN_ITEM, *join.rules.max_per]
        return JoinSpec(
            join.k,
            join.rules.rules(),
            tuple(dict.fromkeys(wanted)),
            join.threads,
            join.max_probe,
            join.evidence,
        )

    def pair_spec(self) -> PairSpec | None:
        """Returns which images are near-duplicates, or None where none are looked for."""
        section = self.duplicates
        if section.threshold is None:
            return None
        return PairSpec(section.threshold, section.nprobe, self.join.threads)

    def graph_spec(self) -> GraphSpec:
        """Returns how much of the graph is kept."""
        return GraphSpec(self.graph.max_reverse)

    def evaluate_spec(self) -> EvaluateSpec:
        """Returns what is measured."""
        section = self.evaluate
        return EvaluateSpec(
            self.promise(),
            section.truth,
            min(section.truth_k, self.join.k),
            section.group_by,
            section.examples,
            self.join_spec().columns,
            section.recall_by,
        )

    def promise(self) -> Promise:
        """Returns what is promised of the recall, and how often it may be tried."""
        section = self.evaluate
        # Only where Kith chose nprobe may it choose another.
        attempts = section.max_attempts if self.index.nprobe is None and section.min_recall else 1
        return Promise(section.min_recall, section.sample, section.seed, attempts)

    def calibration_spec(self) -> CalibrationSpec | None:
        """Returns what nprobe is chosen for, or None where it is given or nothing is promised."""
        if self.index.nprobe is not None or not self.evaluate.min_recall:
            return None
        join = self.join_spec()
        rules = dataclasses.replace(join.rules, exclude=None)
        return CalibrationSpec(self.promise(), join.k, rules)

    def export_spec(self) -> ExportSpec:
        """Returns what is exported."""
        section = self.export
        items = None
        if section.by == "item":
            items = ItemRows(self.join.k, tuple(self.join.rules.max_per.items()))
        return ExportSpec(section.formats, section.columns, section.min_score, items)
