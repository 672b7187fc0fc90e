"""The configuration: one YAML file, checked whole before any work.

Unknown keys are refused with their full path. Relative paths are relative to the file's folder. The
field descriptions are the configuration reference (`docs/configuration.md` is made from them).
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from index_builder import storage
from index_builder.embeddings import RESERVED_COLUMNS
from index_builder.errors import ConfigError
from index_builder.join import JoinSpec
from index_builder.rules import JoinRules
from index_builder.spec import IndexSpec, Metric, TransformSpec
from transforms.decoding import DEFAULT_MAX_PIXELS
from transforms.embed import EmbedSpec
from transforms.encoders.family import EncoderSpec, Pooling
from transforms.encoders.registry import check_encoder, encoder_names, resolve_input_size
from transforms.evaluate import EvaluateSpec
from transforms.exports import ExportSpec
from transforms.locations import CommandLineText, Location
from transforms.preprocessing import Interpolation, Preprocessing, Resize
from transforms.sources.registry import AnySource

EIGEN_POWER = {"none": 0.0, "half": -0.25, "full": -0.5}

# Columns of the index that a join or an export may name beside the configured metadata.
INDEX_COLUMNS = frozenset({"image_id", "item_id", "source_shard", "row"})

_FORMATS = frozenset({"tfrecord", "files"})


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class Encoder(Section):
    """The network that turns an image into a vector, and the pixels it gets to see."""

    name: str = Field("efficientnet_lite0", description="One of the registered encoders, or `custom`.")
    weights: str = Field(
        "imagenet",
        description="`imagenet`, `random`, or a path: a `.weights.h5` file of the named network; "
        "for `custom` a `.keras` file or a SavedModel folder.",
    )
    pooling: Pooling = Field(
        "avg", description="How the last feature map becomes a vector: `avg`, `max` or `flatten`."
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
        "settings are unchanged, instead of encoding them again.",
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

    metric: Literal["cosine"] = Field("cosine", description="How vectors are compared.")
    transform: Transform = Transform()
    nlist: AutoCount = Field(None, description="Inverted lists.")
    nprobe: AutoCount = Field(None, description="Lists searched for one query.")
    shards: AutoCount = Field(None, description="Index shards; `auto` makes them about 256 MB.")
    training_rows: int = Field(
        500_000, ge=1, description="Vectors in the random sample that the index is trained on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the sample and of k-means.")
    memory_limit_gib: float = Field(
        8.0, gt=0, description="A training that would take more is refused before any work."
    )


class Rules(Section):
    """Which items may be neighbours; applied before the best are chosen, never after."""

    same: tuple[str, ...] = Field(
        (), description="Metadata columns whose value must be equal; null equals nothing."
    )
    different: tuple[str, ...] = Field((), description="Metadata columns whose value must differ.")


class Join(Section):
    """The all-against-all join."""

    k: int = Field(20, ge=1, le=10_000, description="Neighbours of each item.")
    rules: Rules = Rules()
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
        description="A run whose recall has a 95 % lower bound below this is not published.",
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
    encoder: Encoder = Encoder()
    embeddings: Embeddings = Embeddings()
    index: Index = Index()
    join: Join = Join()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    nightly: Nightly = Nightly()

    def embed_spec(self) -> EmbedSpec:
        """Returns what decides about embeddings. May open a SavedModel to learn its input size."""
        encoder = self.encoder_spec()
        preprocessing = Preprocessing(
            resolve_input_size(encoder), self.encoder.resize, self.encoder.interpolation
        )
        return EmbedSpec(
            self.images.sources,
            tuple(self.images.metadata.items()),
            self.images.max_pixels,
            encoder,
            preprocessing,
            self.encoder.batch_size,
            self.encoder.decode_threads,
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

    def join_spec(self) -> JoinSpec:
        """Returns the join; it carries every column that a later stage needs."""
        evaluate = [self.evaluate.truth, self.evaluate.group_by]
        wanted = [*self.export.columns, *(name for name in evaluate if name)]
        rules = JoinRules(self.join.rules.same, self.join.rules.different)
        return JoinSpec(self.join.k, rules, tuple(dict.fromkeys(wanted)), self.join.threads)

    def evaluate_spec(self) -> EvaluateSpec:
        """Returns what is measured."""
        section = self.evaluate
        return EvaluateSpec(
            section.sample,
            section.seed,
            section.truth,
            min(section.truth_k, self.join.k),
            section.group_by,
            section.examples,
            self.join_spec().columns,
        )

    def export_spec(self) -> ExportSpec:
        """Returns what is exported."""
        section = self.export
        return ExportSpec(section.formats, section.columns, section.min_score)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration file with `a.b=value` overrides.

    Raises ConfigError, which lists every problem with its full key path.
    """
    try:
        text = storage.read_bytes(path).decode()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(
            f"The configuration file {path} does not exist. Give one with --config FILE; "
            "configs/local.yaml of the repository is a complete example."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}. Give a YAML file.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}. Correct it there.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, wanted a mapping with sections such as "
            "`workspace` and `images`. See docs/configuration.md."
        )
    for override in overrides:
        _apply_override(values, override)
    base = path.rsplit("/", 1)[0] if storage.is_remote(path) else os.path.dirname(
        os.path.abspath(path)
    )  # fmt: skip
    try:
        config = Config.model_validate(values, context={"base": base})
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in _causes(error.errors()))
        raise ConfigError(f"The configuration {path} is wrong:\n{problems}") from error
    config = _resolve_weights(config, base, overrides)
    check_config(config)
    return config


def _resolve_weights(config: Config, base: str, overrides: Sequence[str]) -> Config:
    """Makes a path of weights absolute, by the same rule as other paths."""
    weights = config.encoder.weights
    if weights in ("imagenet", "random"):
        return config
    typed = any(override.startswith("encoder.weights=") for override in overrides)
    path = os.path.join(os.getcwd() if typed else base, os.path.expanduser(weights))
    encoder = config.encoder.model_copy(update={"weights": os.path.normpath(path)})
    return config.model_copy(update={"encoder": encoder})


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one dotted key; list items are addressed by number. The value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"--set got {override!r}, wanted key=value with a dotted key, as in --set join.k=10."
        )
    try:
        value = _mark_typed(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not valid YAML: {error}.") from error
    *parents, last = key.split(".")
    node: Any = values
    for name in parents:
        if isinstance(node, dict):
            if not isinstance(node.get(name), dict | list):
                node[name] = {}
            node = node[name]
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            raise ConfigError(f"--set {key}: {name!r} is no key and no item of the configuration.")
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    else:
        raise ConfigError(f"--set {key}: {last!r} is no key and no item of the configuration.")


def _mark_typed(value: Any) -> Any:
    if isinstance(value, str):
        return CommandLineText(value)
    if isinstance(value, list):
        return [_mark_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _mark_typed(item) for key, item in value.items()}
    return value


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Leaves out what pydantic says of a list only because an item of it is wrong."""
    places = [problem["loc"] for problem in problems]
    return [
        problem
        for problem in problems
        if not any(len(place) > len(problem["loc"]) and place[: len(problem["loc"])] == problem["loc"]
                   for place in places)
    ]  # fmt: skip


def _is_tag(loc: Sequence[Any], place: int) -> bool:
    """Tells whether a part of a location is a source's format, which pydantic puts after its number."""
    return place > 0 and loc[place] in _FORMATS and isinstance(loc[place - 1], int)


def _explain(problem: Any) -> str:
    """Says of one validation problem: full key path, got, wanted, what to do."""
    loc = problem["loc"]
    path = [part for place, part in enumerate(loc) if not _is_tag(loc, place)]
    where = ".".join(str(part) for part in path)
    got = problem["input"]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return f"{where}: unknown key. {hint}Known keys here: {', '.join(sorted(known))}."
    if problem["type"] == "missing":
        return f"{where}: missing. It has no default: set it."
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{where}.format: got {_shown(got, 'format')}, wanted one of {sorted(_FORMATS)}. Set it."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: got {got!r}, wanted: {message}. Correct the value (docs/configuration.md)."


def _shown(got: Any, key: str) -> str:
    return repr(got.get(key)) if isinstance(got, dict) else repr(got)


def _known_keys(path: Sequence[Any]) -> list[str]:
    """Returns the keys that the section at a location may have."""
    models: list[Any] = [Config]
    for place, part in enumerate(path):
        if isinstance(part, int):
            continue
        if _is_tag(path, place):
            models = [m for m in models if part in get_args(m.model_fields["format"].annotation)]
            continue
        models = [
            found
            for model in models
            if part in model.model_fields
            for found in _models_in(model.model_fields[part].annotation)
        ]
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    """Returns the models that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [model for part in parts for model in _models_in(part)]


def check_config(config: Config) -> None:
    """Refuses combinations that cannot work. Raises ConfigError."""
    if config.encoder.name not in encoder_names():
        raise ConfigError(
            f"encoder.name: got {config.encoder.name!r}, wanted one of "
            f"{', '.join(encoder_names())}. Correct the name."
        )
    check_encoder(config.encoder_spec())
    taken = sorted(RESERVED_COLUMNS & set(config.images.metadata))
    if taken:
        raise ConfigError(
            f"images.metadata: {taken[0]!r} is a column that Kith writes itself, wanted a name of "
            "your own. Rename it with images.sources.features.metadata."
        )
    labels = [source.label for source in config.images.sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"images.sources: {labels.count(label)} sources are named {label!r}, wanted "
                "different names. Set `name` of each source."
            )
    if config.images.sources:
        _check_columns(config)
    both = set(config.join.rules.same) & set(config.join.rules.different)
    if both:
        raise ConfigError(
            f"join.rules: {sorted(both)[0]!r} is in `same` and in `different`, so no pair could be "
            "neighbours. Remove it from one of them."
        )
    twice = sorted(name for name, number in Counter(config.export.columns).items() if number > 1)
    if twice:
        raise ConfigError(
            f"export.columns: got {twice[0]!r} more than once, wanted each column once. Remove one."
        )
    index = config.index
    if index.nlist is not None and index.nprobe is not None and index.nprobe > index.nlist:
        raise ConfigError(
            f"index.nprobe: got {index.nprobe}, wanted at most index.nlist ({index.nlist}). "
            "Lower it, or set it to auto."
        )


def _check_columns(config: Config) -> None:
    """Refuses columns that the catalogue will not have; datasets made elsewhere have their own."""
    known = sorted(set(config.images.metadata) | INDEX_COLUMNS)
    evaluate = config.evaluate
    named: dict[str, Iterable[str | None]] = {
        "join.rules.same": config.join.rules.same,
        "join.rules.different": config.join.rules.different,
        "export.columns": config.export.columns,
        "evaluate.truth": [evaluate.truth],
        "evaluate.group_by": [evaluate.group_by],
    }
    for key, names in named.items():
        for name in names:
            if name is not None and name not in known:
                raise ConfigError(
                    f"{key}: got {name!r}, wanted one of the columns {', '.join(known)}. "
                    "Add it to images.metadata or correct the name."
                )
