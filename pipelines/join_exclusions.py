"""A join's rules as the configuration and the files that it names have them."""

from index_builder.index.shards import IndexDataset
from index_builder.rules import exclusions
from index_builder.search.join import JoinSpec
from index_builder.steps import settled_join
from index_builder.steps.queries import QueriesDataset
from index_builder.steps.settled_join import SettledJoin
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
