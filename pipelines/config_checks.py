"""Combinations of settings that cannot work, refused before any work."""

from collections import Counter
from collections.abc import Iterable

from apache_beam.transforms.resources import parse_resource_hints

from index_builder.datasets.embeddings import METADATA_TYPES, RESERVED_COLUMNS
from index_builder.datasets.table_files import check_collisions
from index_builder.errors import ConfigError
from index_builder.rules.conditions import check_condition
from index_builder.scoring.metrics import Metric
from index_builder.search import groups
from index_builder.steps.pairs import check_threshold
from pipelines.config import Config
from pipelines.sections.catalogue import CatalogMetadata
from transforms.encoders.registry import check_encoder, encoder_names

# Columns of the index that a join or an export may name beside the configured metadata.
_INDEX_COLUMNS = frozenset({"image_id", "item_id", "source_shard", "row"})


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
            "your own. Rename it with the metadata mapping of the source (`features`, `fields` or "
            "`columns`)."
        )
    _check_table(config)
    _check_duplicates(config)
    try:
        parse_resource_hints(config.embeddings.resource_hints)
    except ValueError as error:
        raise ConfigError(
            f"embeddings.resource_hints: {error}. Name hints of Beam, such as accelerator, min_ram and "
            "cpu_count (docs/gpu.md)."
        ) from error
    labels = [source.label for source in config.images.sources]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"images.sources: {labels.count(label)} sources are named {label!r}, wanted "
                "different names. Set `name` of each source."
            )
    if config.images.sources:
        _check_columns(config)
        _check_conditions(config)
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


def _check_duplicates(config: Config) -> None:
    """Refuses a threshold that the metric cannot have, and columns named like those of the groups."""
    section = config.duplicates
    if section.threshold is None:
        return
    check_threshold(Metric(config.index.metric), section.threshold)
    for key, columns in (
        ("images.metadata", config.images.metadata),
        ("catalog.metadata.columns", config.catalog.metadata.columns),
    ):
        taken = sorted(set(groups.COLUMNS) & set(columns))
        if taken:
            raise ConfigError(
                f"{key}: {taken[0]!r} is a column of the near-duplicate groups, wanted a name of your "
                "own. Rename it, or set duplicates.threshold to null."
            )
    nprobe = config.index.nprobe
    if section.nprobe is not None and nprobe is not None and section.nprobe > nprobe:
        raise ConfigError(
            f"duplicates.nprobe: got {section.nprobe}, wanted at most index.nprobe ({nprobe}). Lower "
            "it, or set it to auto."
        )


def _check_table(config: Config) -> None:
    """Refuses a metadata table that is half described or whose columns have names that are taken."""
    section, spec = config.catalog.metadata, config.table_spec()
    if spec is None:
        if section != CatalogMetadata():
            raise ConfigError(
                "catalog.metadata.paths: missing, but other keys of the table are set. Name its files, "
                "or remove the section."
            )
        return
    if not spec.columns:
        raise ConfigError(
            "catalog.metadata.columns: missing. Say what to take from the table, as in "
            "columns: {stock: int64}, or remove the section."
        )
    taken = sorted((RESERVED_COLUMNS | _INDEX_COLUMNS) & set(spec.names))
    if taken:
        raise ConfigError(
            f"catalog.metadata.columns.{taken[0]}: {taken[0]!r} is a column that Kith writes itself, "
            "wanted a name of your own. Rename it in the table."
        )
    check_collisions(spec, config.images.metadata)


def _check_columns(config: Config) -> None:
    """Refuses columns that the catalogue will not have; datasets made elsewhere have their own."""
    made = () if config.duplicates.threshold is None else groups.COLUMNS
    known = sorted({*config.images.metadata, *config.catalog.metadata.columns, *_INDEX_COLUMNS, *made})
    evaluate = config.evaluate
    named: dict[str, Iterable[str | None]] = {
        "join.rules.same": config.join.rules.same,
        "join.rules.different": config.join.rules.different,
        "join.rules.queries": [section.column for section in config.join.rules.queries],
        "join.rules.candidates": [section.column for section in config.join.rules.candidates],
        "join.rules.max_per": config.join.rules.max_per,
        "export.columns": config.export.columns,
        "evaluate.truth": [evaluate.truth],
        "evaluate.group_by": [evaluate.group_by],
        "evaluate.recall_by": [evaluate.recall_by],
    }
    for key, names in named.items():
        for name in names:
            if name is not None and name not in known:
                raise ConfigError(
                    f"{key}: got {name!r}, wanted one of the columns {', '.join(known)}. "
                    "Add it to images.metadata or catalog.metadata.columns, or correct the name."
                )


def _check_conditions(config: Config) -> None:
    """Refuses conditions whose values do not fit a column's configured type."""
    types = dict.fromkeys(("image_id", "item_id", "source_shard"), METADATA_TYPES["string"])
    types["row"] = METADATA_TYPES["int64"]
    if config.duplicates.threshold is not None:
        types |= {name: groups.SCHEMA.field(name).type for name in groups.COLUMNS}
    for columns in (config.images.metadata, config.catalog.metadata.columns):
        types |= {name: METADATA_TYPES[kind] for name, kind in columns.items()}
    rules = config.join.rules
    for key, sections in (("queries", rules.queries), ("candidates", rules.candidates)):
        for number, section in enumerate(sections):
            if section.column in types:
                where = f"join.rules.{key}.{number}"
                check_condition(section.condition(), types[section.column], where)
