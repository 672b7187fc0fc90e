"""What the embed stage would make of a configuration and a catalogue, without making it."""

import dataclasses

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from pipelines.config import Config
from pipelines.stage import dataset_folder
from transforms import failures
from transforms.embed import EmbedSpec, EmbedTask
from transforms.encoders.engines.choice import EngineChoice
from transforms.sources.base import ImageShard


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The graph's configuration: what to embed, in which tasks, where to, on which workers."""

    spec: EmbedSpec
    tasks: tuple[EmbedTask, ...]
    embeddings_folder: str
    failures_folder: str
    resource_hints: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class EmbedPlan:
    """The embed stage of a configuration and catalogue: its graph and its identity."""

    graph: EmbedConfig
    encoder: dict[str, object]
    identity: str

    def at_version(self, workspace: str, number: int) -> "EmbedPlan":
        """Returns the plan with the folders of a version of its datasets."""
        return dataclasses.replace(
            self,
            graph=dataclasses.replace(
                self.graph,
                embeddings_folder=_folder(workspace, embeddings.KIND, self.identity, number),
                failures_folder=_folder(workspace, failures.KIND, self.identity, number),
            ),
        )


def plan_embedding(config: Config, choice: EngineChoice) -> EmbedPlan:
    """Lists the catalogue's shards and derives the stage's datasets: their newest versions."""
    spec = config.embed_spec(choice)
    encoder = spec.encoder_fingerprint()
    tasks = tuple(
        EmbedTask(shard, f"part-{number:05d}", spec.part_key(shard, encoder))
        for number, shard in enumerate(list_shards(config))
    )
    identity = fingerprint({"kind": embeddings.KIND, "parts": [task.key for task in tasks]})
    hints = tuple(sorted(config.embeddings.resource_hints.items()))
    plan = EmbedPlan(EmbedConfig(spec, tasks, "", "", hints), encoder, identity)
    return plan.at_version(config.workspace, newest_version(config.workspace, identity))


def list_shards(config: Config) -> list[ImageShard]:
    """Lists the shards of all sources, in order."""
    scratch = storage.join(config.workspace, "listings")
    return [
        shard
        for number, source in enumerate(config.images.sources)
        for shard in source.list_shards(number, scratch)
    ]


def newest_version(workspace: str, identity: str) -> int:
    """Returns the number of the newest complete version of an embeddings dataset; 1 before any.

    Only a replay of failures makes a second version of what is otherwise the same dataset.
    """
    number = 1
    while manifests.is_complete(_folder(workspace, embeddings.KIND, identity, number + 1)):
        number += 1
    return number


def _folder(workspace: str, kind: str, identity: str, number: int) -> str:
    folder = dataset_folder(workspace, kind, identity)
    return folder if number == 1 else f"{folder}-{number}"
