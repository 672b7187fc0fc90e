"""The configuration reference, made from the models that check a configuration.

`python -m pipelines.config_reference > docs/configuration.md` writes it again.
"""

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.config import Config
from pipelines.sections.base import AutoCount
from pipelines.sections.rules import ConditionSection
from transforms.locations import Location
from transforms.sources.registry import AnySource

_INTRODUCTION = """\
# Configuration

<!-- Made by `python -m pipelines.config_reference > docs/configuration.md`; do not edit. -->

One YAML file. It is checked whole before any work: an unknown key, a wrong type or an impossible
combination is refused with its full key path, exit status 2. `kith check --config FILE` does only that.

- A path is local or `gs://`. A relative path in the file is relative to the file's own folder; one
  given with `--set` is relative to the working directory.
- `--set a.b=value` overrides a key, the value being YAML; items of a list are addressed by number:
  `--set join.k=10 --set 'images.sources.0.paths=photos/*.jpg' --set 'index.transform={type: none}'`.
- Only `workspace` has no default; `images.sources` is needed by every command that reads images.

The whole file with every default: [example](#every-key-at-once). What the words mean:
[concepts](concepts.md).
"""

_EXAMPLE = """\
## Every key at once

The defaults, with one source of each format:

```yaml
runner: DirectRunner
workspace: workspace
images:
  sources:
    - format: tfrecord
      paths: ["catalog/*.tfrecord"]
      name: catalog
      compression: auto
      features:
        image: image/encoded
        image_id: image_id
        item_id: null
        metadata: {}
    - format: files
      paths: ["photos/*.jpg"]
      name: photos
      files_per_shard: 1024
    - format: webdataset
      paths: ["tars/*.tar"]
      name: tars
      fields:
        image: [jpg, jpeg, png, webp, gif, bmp, tif, tiff, dcm, jp2, avif, heic, heif, ico]
        json_member: json
        image_id: __key__
        item_id: null
        metadata: {}
    - format: parquet
      paths: ["parquet/*.parquet"]
      name: parquet
      columns: {image: image, image_id: image_id, item_id: null, metadata: {}}
      rows_per_shard: 4096
    - format: table
      paths: ["tables/images.csv"]
      name: table
      columns: {uri: uri, version: null, image_id: image_id, item_id: null, metadata: {}}
      delimiter: ","
      rows_per_shard: 1024
      fetch_threads: 16
      fetch_attempts: 3
      fetch_backoff_sec: 0.5
  metadata: {}
  max_pixels: 178956970
  truncated: fail
  scaled_decoding: true
  dicom_frame: first
  decode_timeout_sec: 120.0
catalog:
  metadata: {paths: [], key: item_id, id_column: null, columns: {}}
encoder:
  name: efficientnet_lite0
  weights: imagenet
  pooling: avg
  engine: auto
  precision: float32
  input_size: null
  preprocessing: null
  resize: crop
  interpolation: bicubic
  seed: 0
  batch_size: 32
  decode_threads: auto
embeddings:
  reuse: true
  normalize: true
  max_failed_fraction: 1.0
  max_failed_fraction_per_shard: 1.0
  resource_hints: {}
index:
  metric: cosine
  transform: {type: none, dim: 256, whitening: half}
  nlist: auto
  nprobe: auto
  shards: auto
  encoding: auto
  refine: 10
  training_rows: 500000
  seed: 0
  memory_limit_gib: 8.0
duplicates: {threshold: null, nprobe: auto}
join:
  k: 20
  rules:
    same: []
    different: []
    queries: []
    candidates: []
    max_per: {}
    exclude:
      paths: []
      by: image_id
      query_column: query_id
      neighbor_column: neighbor_id
      symmetric: false
      unknown_ids: error
  max_probe: auto
  evidence: []
  threads: auto
evaluate:
  sample: 1000
  seed: 1
  min_recall: 0.0
  max_attempts: 3
  recall_by: null
  truth: null
  truth_k: 10
  group_by: null
  examples: 3
graph: {enabled: false, max_reverse: 100}
export:
  formats: [parquet, jsonl]
  columns: []
  min_score: null
  by: image
nightly:
  publish: true
  report: true
```
"""


def describe_config() -> str:
    """Returns the whole reference as Markdown."""
    pieces = [_INTRODUCTION, "## The top level\n", _table(Config, "")]
    for path, note, model in _sections(Config, "", ""):
        heading = f"## `{path}`" + (f", format {note}" if note else "")
        first_line = (model.__doc__ or "").strip().split("\n")[0]
        pieces += [heading + "\n", first_line + "\n", _table(model, path)]
    pieces.append(_EXAMPLE)
    return "\n".join(pieces)


def _sections(
    model: type[BaseModel], path: str, note: str
) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Yields every model below a model, depth first: its key path, its source's format, itself."""
    for name, field in model.model_fields.items():
        where = _key(path, name)
        if _is_sources(field):
            for source in typing.get_args(typing.get_args(AnySource)[0]):
                shown = f"`{typing.get_args(source.model_fields['format'].annotation)[0]}`"
                yield f"{where}[]", shown, source
                yield from _sections(source, f"{where}[]", shown)
        elif (listed := _listed_section(field)) is not None:
            yield f"{where}[]", note, listed
        elif _is_section(field):
            below: Any = field.annotation
            yield where, note, below
            yield from _sections(below, where, note)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _listed_section(field: FieldInfo) -> type[BaseModel] | None:
    """Returns the section that a field is a list of, if it is one."""
    arguments = typing.get_args(field.annotation)
    found = arguments[0] if typing.get_origin(field.annotation) is tuple else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _is_sources(field: FieldInfo) -> bool:
    return AnySource in typing.get_args(field.annotation)


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _table(model: type[BaseModel], path: str) -> str:
    """Returns a row for every key of a model that holds a value rather than a section."""
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if not _is_section(field):
            text = (field.description or "Says which source this is.").replace("|", "\\|")
            key = _key(path, field.alias or name)
            lines.append(f"| `{key}` | {_type(field)} | {_default(field)} | {text} |")
    # A section that only holds sections has no table.
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _type(field: FieldInfo) -> str:
    kind = _type_name(field.annotation, _bounds(field.metadata))
    if _LOCATION in field.metadata:
        kind = "path"
    return f"`auto` or {kind.removesuffix(' or `null`')}" if _AUTO in field.metadata else kind


_AUTO = typing.get_args(AutoCount)[1]
_LOCATION = typing.get_args(Location)[1]
_NAMES: dict[Any, str] = {
    str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`",
}  # fmt: skip


def _type_name(annotation: Any, bounds: str = "") -> str:
    """Returns a type in words. Raises TypeError for one that has none yet."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation] + (bounds if annotation in (int, float) else "")
    if annotation == AnySource:
        return "source"
    if annotation is ConditionSection:
        return "condition"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if {*arguments} - {type(None)} == {bool, int, float, str}:
        return "truth value, number or text" + " or `null`" * (type(None) in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part, bounds) for part in arguments)
    if origin is Annotated:
        return "path" if _LOCATION in arguments else _type_name(arguments[0], _bounds(arguments[1:]))
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type_name(part) for part in arguments)}]"
    raise TypeError(f"{annotation!r} has no name in the configuration reference. Give it one here.")


_SIGNS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


def _bounds(metadata: Iterable[Any]) -> str:
    """Returns the limits of a number in words, from the constraints of a field."""
    items = [part for item in metadata for part in getattr(item, "metadata", [item])]
    found = [
        f"{words} {getattr(item, sign):,}"
        for sign, words in _SIGNS
        for item in items
        if getattr(item, sign, None) is not None
    ]
    return "".join(f", {text}" for text in found)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "none: set it"
    if default is None:
        return "`auto`" if _AUTO in field.metadata else "`null`"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    print(describe_config(), end="")
