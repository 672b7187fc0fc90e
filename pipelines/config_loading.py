"""Loading a configuration: YAML, `--set` overrides, and messages for people about what is wrong.

Unknown keys are refused with their full path. Relative paths are relative to the file's folder.
"""

import difflib
import os
from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from index_builder.datasets import storage
from index_builder.errors import ConfigError
from pipelines.config import Config
from pipelines.config_checks import check_config
from transforms.locations import CommandLineText
from transforms.sources.registry import FORMATS


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; the standard loader takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads one mapping, before the keys of others are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                problem = f"the key {key.value!r} stands twice in one mapping, in lines "
                problem += f"{lines[name]} and {line}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[name] = line
        return node


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
        values = yaml.load(text, Loader=_UniqueKeys)
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
        value = _mark_typed(yaml.load(text, Loader=_UniqueKeys))
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
    return place > 0 and loc[place] in FORMATS and isinstance(loc[place - 1], int)


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
        return f"{where}.format: got {_shown(got, 'format')}, wanted one of {sorted(FORMATS)}. Set it."
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
    return sorted({field.alias or key for model in models for key, field in model.model_fields.items()})


def _models_in(annotation: Any) -> list[Any]:
    """Returns the models that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [model for part in parts for model in _models_in(part)]
