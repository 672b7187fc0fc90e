"""Which engine embeds a catalogue: settled once, and kept for the nights that follow.

`encoder.engine: auto` takes the engine of the published snapshot as long as nothing else about the
encoder changed, so that a night on another machine does not encode everything again. Before that a
worker is asked, once, and its answer is kept in the workspace.
"""

from typing import Any

import apache_beam as beam

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint, short
from index_builder.errors import KithError
from pipelines.config import Config
from pipelines.publish import published_folder
from pipelines.runners import run_pipeline
from pipelines.stage import Session
from transforms.embed import comparable_without_engine
from transforms.encoders.engines.choice import (
    ENGINES,
    EngineChoice,
    EngineName,
    Precision,
)
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import choose_engine

FOLDER = "engines"


def settle_engine(config: Config, session: Session) -> EngineChoice:
    """Returns the engine and precision of a configuration; asks a worker where nobody knows yet."""
    section = config.encoder
    if section.engine != "auto":
        return EngineChoice(section.engine, section.precision)
    known = recall_engine(config)
    if known is not None:
        return known
    path = _record_path(config)
    session.console.print("embed: asking a worker for the fastest engine that it has")
    hints = config.embeddings.resource_hints

    def define(root: beam.Pipeline) -> object:
        question = beam.Map(_answer, config.encoder_spec(), section.precision, path)
        if hints:
            question = question.with_resource_hints(**hints)
        return root | "OneQuestion" >> beam.Create([None]) | "ChooseEngine" >> question

    run_pipeline(define, session.runner)
    answer = storage.read_json(path)
    session.console.print(f"embed: engine {answer['engine']} ({answer['why']})")
    return EngineChoice(engine_in(answer, path), section.precision)


def recall_engine(config: Config) -> EngineChoice | None:
    """Returns the engine that the catalogue is embedded with, or None where that is open."""
    section = config.encoder
    if section.engine != "auto":
        return EngineChoice(section.engine, section.precision)
    published = published_folder(config.workspace, embeddings.KIND)
    if published is not None:
        found = manifests.load(published, embeddings.KIND).properties["encoder"]
        if all(found.get(key) == value for key, value in _identity(config).items()):
            return EngineChoice(engine_in(found, published), section.precision)
    path = _record_path(config)
    if not storage.exists(path):
        return None
    return EngineChoice(engine_in(storage.read_json(path), path), section.precision)


def _identity(config: Config) -> dict[str, object]:
    """Everything about the encoder but its engine."""
    found = comparable_without_engine(config.encoder_spec(), config.preparation())
    return {**found, "precision": config.encoder.precision}


def _record_path(config: Config) -> str:
    return storage.join(config.workspace, FOLDER, f"{short(fingerprint(_identity(config)))}.json")


def _answer(_: None, spec: EncoderSpec, precision: Precision, path: str) -> None:
    """Runs on a worker: chooses, and leaves the answer where the driver finds it."""
    engine, why = choose_engine(spec, precision)
    storage.write_json(path, {"engine": engine, "why": why})


def engine_in(record: dict[str, Any], where: str) -> EngineName:
    """Returns the engine that a record (a manifest's fingerprint, an answer) names."""
    for engine in ENGINES:
        if record.get("engine") == engine:
            return engine
    raise KithError(
        f"{where} names the engine {record.get('engine')!r}, wanted one of {', '.join(ENGINES)}. "
        "Set encoder.engine."
    )
