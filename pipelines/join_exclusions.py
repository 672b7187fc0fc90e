"""A join's rules as the configuration and the files that it names have them."""

from index_builder import exclusions, settled_join
from index_builder.join import JoinSpec
from index_builder.queries import QueriesDataset
from index_builder.settled_join import SettledJoin
from index_builder.shards import IndexDataset
from pipelines.config import Config
from pipelines.stage import dataset_folder


def settle_join(
    config: Config, index: IndexDataset, spec: JoinSpec, asked: QueriesDataset | None = None
) -> SettledJoin:
    """Returns a join with the exclusions of the configuration. Raises as its namesake does."""
    return settled_join.settle_join(
        index,
        spec,
        config.join.rules.exclude.spec(),
        lambda identity: dataset_folder(config.workspace, exclusions.KIND, identity),
        asked,
    )
