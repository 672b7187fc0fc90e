"""From vectors to neighbours: the index, the groups in it, the join, and its graph."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines.commands.answers import Answer, dataset_answer
from pipelines.commands.options import EmbeddingsOption, IndexOption, NeighborsOption, PlanOption
from pipelines.commands.running import configured, held_workspace

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session

_BUILD_FIGURES = ("shards", "nlist", "nprobe", "dim", "empty_lists", "imbalance")


def _show_plan(result: dict[str, Any], console: Console) -> None:
    from pipelines.plan_report import show_plan

    show_plan(result, console)


@configured
def build(
    config: "Config",
    session: "Session",
    embeddings: EmbeddingsOption = None,
    plan: PlanOption = False,
    merge: Annotated[
        str | None,
        typer.Option(
            "--merge",
            metavar="PATH.faiss",
            help="Also write all shards as one FAISS file, and PATH.parquet with the ids of its rows.",
        ),
    ] = None,
) -> Answer:
    """Train and shard the FAISS index of an embeddings dataset."""
    from pipelines.build_index import build_index, merge_index
    from pipelines.locate import find_embeddings
    from pipelines.plan_report import plan_build

    folder, failures = (embeddings, None) if embeddings else find_embeddings(config)
    if plan:
        return Answer(plan_build(config, folder), _show_plan)
    with held_workspace(config):
        index = build_index(config, session, folder, failures)
        merged = {"merged": merge_index(session, index.folder, merge)} if merge else {}
    return dataset_answer("index", index, _BUILD_FIGURES, **merged)


@configured
def join(
    config: "Config",
    session: "Session",
    index: IndexOption = None,
    queries: Annotated[
        str | None,
        typer.Option(
            "--queries",
            metavar="DIR",
            help="An embeddings dataset whose images are the queries, instead of the index's items.",
        ),
    ] = None,
    limit_ids: Annotated[
        str | None,
        typer.Option(
            "--limit-ids",
            metavar="FILE",
            help="Of --queries take only the image ids of this file: text, one a line, or Parquet.",
        ),
    ] = None,
    plan: PlanOption = False,
) -> Answer:
    """Find the k best neighbours of every item of an index."""
    from index_builder.errors import ConfigError
    from index_builder.search.neighbors import STATUSES
    from pipelines.join_neighbors import join_neighbors
    from pipelines.join_queries import join_queries
    from pipelines.locate import find_index
    from pipelines.plan_report import plan_join

    if limit_ids and not queries:
        raise ConfigError("--limit-ids takes images of --queries, which is missing. Add it.")
    if plan and queries:
        raise ConfigError("--plan plans a join of the index with itself. Leave --queries out.")
    folder = index or find_index(config)
    if plan:
        return Answer(plan_join(config, folder), _show_plan)
    with held_workspace(config):
        if queries:
            asked = join_queries(config, session, folder, queries, limit_ids)
            found, made = asked.neighbors, {"queries": asked.queries.folder}
        else:
            found, made = join_neighbors(config, session, folder), {}
    figures = ("pairs", *STATUSES, "filtered", "widened", "fan_out")
    return dataset_answer("neighbors", found, figures, **made)


@configured
def groups(config: "Config", session: "Session", index: IndexOption = None) -> Answer:
    """Find groups of near-duplicates in an index."""
    from pipelines.find_groups import find_groups
    from pipelines.locate import find_index
    from pipelines.run_manifest import GROUP_FIGURES

    folder = index or find_index(config)
    with held_workspace(config):
        found = find_groups(config, session, folder)
    return dataset_answer("groups", found, GROUP_FIGURES)


@configured
def graph(
    config: "Config",
    session: "Session",
    index: IndexOption = None,
    neighbors: NeighborsOption = None,
) -> Answer:
    """Turn neighbours around: mutual and reverse neighbours, hubness."""
    from pipelines.locate import find_index, find_neighbors
    from pipelines.neighbor_graph import neighbor_graph
    from pipelines.run_manifest import GRAPH_FIGURES

    index_folder = index or find_index(config)
    folder = neighbors or find_neighbors(config, index_folder)
    with held_workspace(config):
        made = neighbor_graph(config, session, index_folder, folder)
    return dataset_answer("graph", made, GRAPH_FIGURES)
