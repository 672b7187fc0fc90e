"""Finding the datasets of a configuration, for stages that run alone."""

from index_builder.datasets import embeddings, manifests
from index_builder.errors import DatasetError
from index_builder.index import shards
from index_builder.index.shards import open_index
from index_builder.search import neighbors
from pipelines.build_index import index_identity, next_attempt
from pipelines.config import Config
from pipelines.embed_plan import plan_embedding
from pipelines.engine_choice import recall_engine
from pipelines.join_neighbors import neighbors_identity
from pipelines.preflight import require_sources
from pipelines.stage import dataset_folder


def find_embeddings(config: Config) -> tuple[str, str]:
    """Returns the folders of the embeddings and failures of a configuration. Raises DatasetError."""
    require_sources(config)
    choice = recall_engine(config)
    if choice is None:
        raise DatasetError(
            f"There is no embeddings dataset for this configuration in {config.workspace}: nothing was "
            "embedded yet. Run kith embed with the same configuration first, or name a finished "
            "dataset with --embeddings."
        )
    plan = plan_embedding(config, choice)
    _require(plan.graph.embeddings_folder, "embeddings", "kith embed", "--embeddings")
    return plan.graph.embeddings_folder, plan.graph.failures_folder


def find_index(config: Config) -> str:
    """Returns the folder of the index of a configuration: of the last attempt that was made.

    Raises DatasetError.
    """
    source = manifests.load(find_embeddings(config)[0], embeddings.KIND)
    folder = dataset_folder(config.workspace, shards.KIND, index_identity(config, source))
    _require(folder, "index", "kith build", "--index")
    while retry := next_attempt(config, folder, manifests.load(folder, shards.KIND)):
        raised = dataset_folder(config.workspace, shards.KIND, index_identity(config, source, retry))
        if not manifests.is_complete(raised):
            break
        folder = raised
    return folder


def find_neighbors(config: Config, index_folder: str | None) -> str:
    """Returns the folder of the neighbours of a configuration. Raises DatasetError."""
    index = open_index(index_folder or find_index(config))
    identity = neighbors_identity(config, index)
    folder = dataset_folder(config.workspace, neighbors.KIND, identity)
    _require(folder, "neighbors", "kith join", "--neighbors")
    return folder


def _require(folder: str, kind: str, command: str, option: str) -> None:
    if not manifests.is_complete(folder):
        raise DatasetError(
            f"There is no {kind} dataset for this configuration and catalogue ({folder}). Run "
            f"{command} with the same configuration first, or name a finished dataset with {option}."
        )
