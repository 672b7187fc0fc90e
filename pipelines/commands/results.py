"""What becomes of neighbours: they are measured, exported, and looked up."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipelines.commands.answers import Answer, stage_figures
from pipelines.commands.options import IndexOption, NeighborsOption
from pipelines.commands.running import configured, held_workspace

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session


@configured
def export(config: "Config", session: "Session", neighbors: NeighborsOption = None) -> Answer:
    """Write neighbours as Parquet and JSONL for a warehouse or key-value store."""
    from pipelines.export_neighbors import export_neighbors
    from pipelines.locate import find_neighbors

    folder = neighbors or find_neighbors(config, None)
    with held_workspace(config):
        written = export_neighbors(config, session, folder)
    pairs = written.manifest.properties["pairs"]
    return Answer({"export": written.folder, "pairs": pairs, **stage_figures(written)})


@configured
def evaluate(
    config: "Config",
    session: "Session",
    index: IndexOption = None,
    neighbors: NeighborsOption = None,
) -> Answer:
    """Measure recall against exact neighbours, and hits on known right answers."""
    from pipelines.evaluate_neighbors import check_recall, evaluate_neighbors, read_evaluation
    from pipelines.locate import find_embeddings, find_index, find_neighbors

    index_folder = index or find_index(config)
    source = None if index else find_embeddings(config)[0]
    folder = neighbors or find_neighbors(config, index_folder)
    with held_workspace(config):
        measured = evaluate_neighbors(config, session, index_folder, folder, source)
    figures = read_evaluation(measured)
    check_recall(figures, config.evaluate.min_recall)
    return Answer(
        {
            "evaluation": measured.folder,
            "recall": figures["recall"],
            "truth": figures["truth"],
            **stage_figures(measured),
        }
    )


@configured
def search(
    config: "Config",
    session: "Session",
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images to look for.")],
    index: IndexOption = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of each image.")] = 10,
    nprobe: Annotated[
        int | None, typer.Option("--nprobe", min=1, help="Lists to search; default: the index's.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="Metadata to show; default: export.columns. Repeatable."),
    ] = None,
) -> Answer:
    """Embed new images and print their nearest items of the published index."""
    from index_builder.index import shards
    from pipelines.publish import require_published
    from pipelines.search_images import search_images

    folder = index or require_published(config.workspace, shards.KIND)
    shown = tuple(columns) if columns else config.export.columns
    results = search_images(config, folder, images, k, nprobe, shown)
    answer = {"index": folder, "results": [result.to_json() for result in results]}
    return Answer(answer, _show_results)


def _show_results(result: dict[str, Any], console: Console) -> None:
    for found in result["results"]:
        if found["failure"]:
            failure = found["failure"]
            text = f"{found['image']}: {failure['reason']}: {failure['error']}"
            console.print(text, style="red", markup=False)
            continue
        names = list(found["neighbors"][0]) if found["neighbors"] else ["rank"]
        table = Table(*names, title=found["image"])
        for row in found["neighbors"]:
            cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
            table.add_row(*cells)
        console.print(table)
