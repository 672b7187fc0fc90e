"""The configuration as a model: sections, keys, types, defaults, and what stages take from it.

The field descriptions are the configuration reference (`docs/configuration.md` is made from them).
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from index_builder.calibration import CalibrationSpec
from index_builder.graph import GraphSpec
from index_builder.join import JoinSpec
from index_builder.metrics import Metric
from index_builder.pairs import PairSpec
from index_builder.recall import Promise
from index_builder.rules import OWN_ITEM
from index_builder.spec import Goal, IndexSpec, TransformSpec
from index_builder.table_files import TableSpec
from pipelines.rules_config import Rules
from pipelines.sections import Section
from transforms.decoding import DEFAULT_MAX_PIXELS, DecodePolicy
from transforms.embed import EmbedSpec
from transforms.encoders.engines.choice import EngineChoice, EngineName, Precision
from transforms.encoders.family import EncoderSpec, Pooling
from transforms.encoders.registry import resolve_input_size
from transforms.evaluate import EvaluateSpec
from transforms.exports import ExportSpec
from transforms.item_rows import ItemRows
from transforms.locations import Location
from transforms.prepare import Preparation
from transforms.preprocessing import Interpolation, Preprocessing, Resize
from transforms.sources.registry import AnySource

EIGEN_POWER = {"none": 0.0, "half": -0.25, "full": -0.5}

# Columns of the index that a join or an export may name beside the configured metadata.
INDEX_COLUMNS = frozenset({"image_id", "item_id", "source_shard", "row"})


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]
AutoCountOrZero = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_auto)]


class Images(Section):
    """The catalogue: where its images are and what is known of them."""

    sources: tuple[AnySource, ...] = Field(
        (),
        description="One or more sources; each names its `format`. Only stages that run on datasets "
        "made elsewhere go without.",
    )
    metadata: dict[str, Literal["string", "int64", "float64", "bool"]] = Field(
        default_factory=dict,
        description="Columns to carry along, with their types; null where a source has none.",
    )
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS,
        ge=1,
        description="An image with more pixels is a failure (`too_large`), not a memory problem.",
    )
    truncated: Literal["fail", "accept"] = Field(
        "fail",
        description="What becomes of an image whose bytes end too early: a failure (`truncated`), or "
        "what there is of it.",
    )
    scaled_decoding: bool = Field(
        True,
        description="Decode a JPEG at the smallest scale that is not below the encoder's input. Twice "
        "as fast or more; the vectors differ a little, so it is part of the encoder's fingerprint.",
    )
    dicom_frame: Literal["first", "middle"] = Field(
        "first", description="The frame of a DICOM file that has several."
    )
    decode_timeout_sec: float = Field(
        120.0,
        gt=0,
        description="An image that takes longer to decode is tried once more, for as long, in a "
        "process of its own, and is then a failure (`decoder_timed_out`).",
    )


class CatalogMetadata(Section):
    """A table of what changes faster than images, joined by id when the index is built.

    Absent unless `paths` is set. A changed table makes a new index and embeds nothing again.
    """

    paths: tuple[Location, ...] = Field(
        (),
        description="The table: `.parquet`, `.csv` or `.csv.gz` files or globs, local or `gs://`; "
        "`[]` is no table. In CSV an empty value is null.",
    )
    key: Literal["item_id", "image_id"] = Field(
        "item_id", description="The id by which rows are found; an item's values go to all its images."
    )
    id_column: str | None = Field(
        None, min_length=1, description="The table's column with that id; by default named as `key`."
    )
    columns: dict[str, Literal["string", "int64", "float64", "bool"]] = Field(
        default_factory=dict,
        description="Columns to take, with their types; null where the table does not have the id.",
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Catalog(Section):
    """What is known of the catalogue beside its images."""

    metadata: CatalogMetadata = CatalogMetadata()


class Encoder(Section):
    """The network that turns an image into a vector, and the pixels it gets to see."""

    name: str = Field("efficientnet_lite0", description="One of the registered encoders, or `custom`.")
    weights: str = Field(
        "imagenet",
        description="`imagenet`, `random`, or a path: a `.weights.h5` file of the named network; "
        "for `custom` a `.keras` file or a SavedModel folder.",
    )
    pooling: Pooling = Field(
        "avg",
        description="How the last feature map becomes a vector: `avg`, `max`, `gem` (their generalised "
        "mean, power 3) or `flatten`.",
    )
    engine: Literal["auto"] | EngineName = Field(
        "auto",
        description="What runs the network: `tensorflow` everywhere, `openvino` on CPUs, `jax` on "
        "GPUs. `auto` keeps the engine of the published snapshot; before the first one a worker says "
        "which is the fastest that it has.",
    )
    precision: Precision = Field(
        "float32",
        description="`bfloat16` is about twice as fast where the hardware has it; the vectors differ "
        "a little, retrieval stays within noise.",
    )
    input_size: tuple[int, int] | None = Field(
        None, description="[height, width]; by default the network's own."
    )
    preprocessing: str | None = Field(
        None,
        description="Only for `custom`: `none`, `tf`, `torch`, `caffe`, or the name of an encoder "
        "whose normalisation the model expects.",
    )
    resize: Resize = Field(
        "crop",
        description="`crop` keeps the centre with the input's proportions, `pad` keeps the whole "
        "image on white, `stretch` ignores proportions.",
    )
    interpolation: Interpolation = Field("bicubic", description="Pillow's filter for resizing.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of `random` weights.")
    batch_size: int = Field(32, ge=1, le=4096, description="Images in one call of the network.")
    decode_threads: AutoCount = Field(
        None, description="Threads that decode ahead of the network; `auto` takes all cores."
    )


class Embeddings(Section):
    """The embeddings dataset."""

    reuse: bool = Field(
        True,
        description="Take over parts of the published snapshot whose input shard, encoder and "
        "settings are unchanged, and vectors of pictures whose bytes are, instead of encoding them "
        "again.",
    )
    normalize: bool = Field(
        True,
        description="`true`: vectors of unit length in float16. `false`: the encoder's own numbers in "
        "float32, where lengths count (index.metric). It is part of the encoder's fingerprint.",
    )
    max_failed_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="A run in which a larger part of all images fails is not published.",
    )
    max_failed_fraction_per_shard: float = Field(
        1.0, ge=0, le=1, description="The same for each input shard alone."
    )
    resource_hints: dict[str, str] = Field(
        default_factory=dict,
        description="Beam's resource hints for the workers that embed, such as `accelerator` and "
        "`min_ram` (docs/gpu.md).",
    )


class Transform(Section):
    """The linear transform that the index applies to every vector."""

    type: Literal["none", "pca"] = Field("none", description="`pca` reduces the dimensions.")
    dim: int = Field(256, ge=1, description="Dimensions that PCA keeps.")
    whitening: Literal["none", "half", "full"] = Field(
        "half",
        description="Scales each component by eigenvalue^-0.25 (`half`), ^-0.5 (`full`) or not.",
    )


class Index(Section):
    """The FAISS index."""

    metric: Literal["cosine", "euclidean", "inner_product"] = Field(
        "cosine",
        description="How vectors are compared: by their angle, by distance, or by the dot product. The "
        "last two are meant for embeddings.normalize: false; of unit vectors all three rank alike.",
    )
    transform: Transform = Transform()
    nlist: AutoCount = Field(
        None, description="Inverted lists. `kith build --plan` says what `auto` chooses, and why."
    )
    nprobe: AutoCount = Field(
        None,
        description="Lists searched for one query; `auto`: all up to 20,000 images, else calibrated "
        "for `evaluate.min_recall` on real queries, or 4 sqrt(nlist) where nothing is promised.",
    )
    shards: AutoCount = Field(
        None,
        description="Index shards; `auto` makes them about 256 MB, or smaller where memory is short.",
    )
    training_rows: int = Field(
        500_000, ge=1, description="Vectors in the random sample that the index is trained on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the sample and of k-means.")
    memory_limit_gib: float = Field(
        8.0,
        gt=0,
        description="What one task may take: training, building or joining one shard. A spec that "
        "would take more is refused before any work.",
    )


class Duplicates(Section):
    """Groups of near-duplicates, found in the index before the join.

    Their columns `group`, `is_representative` and `group_size` can be named by rules and exports.
    """

    threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Two images with at least this score (of `index.metric`) are in one group, and so "
        "are those that others link; `null` looks for none.",
    )
    nprobe: AutoCount = Field(
        None,
        description="Two images are compared when the list of one is among so many nearest lists of "
        "the other; `auto`: all that the index keeps, `index.nprobe`.",
    )


class Join(Section):
    """The all-against-all join."""

    k: int = Field(20, ge=1, le=10_000, description="Neighbours of each item.")
    rules: Rules = Rules()
    max_probe: AutoCountOrZero = Field(
        None,
        description="A query that the probed lists leave with fewer than k neighbours is searched "
        "again over this many lists; `auto`: four times index.nprobe; 0: never.",
    )
    evidence: tuple[Literal["margin"], ...] = Field(
        (), description="More about each neighbour: `margin` is its score minus that of the next."
    )
    threads: AutoCount = Field(None, description="Threads of one join task; `auto`: all cores.")


class Evaluate(Section):
    """What is measured before anything is published."""

    sample: int = Field(
        1000, ge=1, description="Queries in the random sample that recall is measured on."
    )
    seed: int = Field(1, ge=0, lt=2**31, description="Seed of the sample.")
    min_recall: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A run whose recall has a 95 % lower bound below this is not published. With "
        "index.nprobe `auto` it is also what nprobe is calibrated for, and raised for.",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="How often a run may certify recall, with nprobe raised by half each time, before "
        "it is refused. A fixed index.nprobe is never raised.",
    )
    recall_by: str | None = Field(
        None, description="Metadata column by whose values recall is certified, too."
    )
    truth: str | None = Field(
        None,
        description="Metadata column whose equal values are right answers; adds hit rates.",
    )
    truth_k: int = Field(10, ge=1, description="A hit is a right answer among this many.")
    group_by: str | None = Field(
        None, description="Metadata column by which figures and examples are listed."
    )
    examples: int = Field(
        3, ge=0, le=20, description="Best, typical and worst queries a group on the page."
    )


class Graph(Section):
    """Mutual neighbours, reverse neighbours and hubness, from the finished join."""

    enabled: bool = Field(
        False, description="Make it in the nightly run; `kith graph` makes it in any case."
    )
    max_reverse: int = Field(
        100,
        ge=1,
        description="Reverse neighbours of an item that are kept, best first; all are counted.",
    )


class Export(Section):
    """The files that a recommender loads."""

    formats: tuple[Literal["parquet", "jsonl"], ...] = Field(
        ("parquet", "jsonl"), min_length=1, description="`parquet`, `jsonl`, or both."
    )
    columns: tuple[str, ...] = Field((), description="Metadata of the neighbours to write along.")
    min_score: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Neighbours with a lower score are left out; the query keeps its row.",
    )
    by: Literal["image", "item"] = Field(
        "image",
        description="What a row is of. `item`: all images of an item together, its neighbours items, "
        "each with its best image.",
    )


class Nightly(Section):
    """The nightly run."""

    publish: bool = Field(True, description="Point `current.json` at a run that passed its gates.")
    report: bool = Field(True, description="Write the HTML page.")


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
