"""The command line. Heavy modules are imported by the command that needs them."""

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from index_builder.errors import KithError

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session

app = typer.Typer(
    name="kith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bulk similar-item recommendations from a catalogue of images. "
    "Beam options go after --, as in: kith nightly --config FILE -- --runner=FlinkRunner",
    epilog="Exit status: 0 done, 1 the run failed or a gate refused it, 2 the command or the "
    "configuration is wrong.",
)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", metavar="FILE", help="The YAML configuration.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a dotted key; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the logs of Beam and tracebacks.")]
EmbeddingsOption = Annotated[
    str | None,
    typer.Option(
        "--embeddings", metavar="DIR", help="An embeddings dataset, instead of the configuration's."
    ),
]
IndexOption = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="An index, instead of the configuration's."),
]
NeighborsOption = Annotated[
    str | None,
    typer.Option(
        "--neighbors", metavar="DIR", help="A neighbours dataset, instead of the configuration's."
    ),
]

PlanOption = Annotated[
    bool,
    typer.Option("--plan", help="Print what it would take in bytes, memory and time; do not do it."),
]

# Beam's options: what stood after `--` on the command line.
_beam_options: tuple[str, ...] = ()

Command = Callable[["Config", "Session"], dict[str, Any]]
Show = Callable[[dict[str, Any], Console], None]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    global _beam_options
    arguments = sys.argv[1:] if arguments is None else arguments
    _beam_options = ()
    if "--" in arguments:
        place = arguments.index("--")
        arguments, _beam_options = arguments[:place], tuple(arguments[place + 1 :])
    # Some libraries look for their own flags on the command line.
    sys.argv = sys.argv[:1]
    app(args=arguments, prog_name="kith")


def _run(
    name: str,
    config_path: str,
    overrides: list[str] | None,
    as_json: bool,
    verbose: bool,
    command: Command,
    show: Show,
) -> None:
    """Runs one command that takes a configuration."""

    def work(console: Console) -> dict[str, Any]:
        config, session = _open_session(config_path, overrides, console)
        return command(config, session)

    _report(name, as_json, verbose, work, show)


def _report(
    name: str,
    as_json: bool,
    verbose: bool,
    work: Callable[[Console], dict[str, Any]],
    show: Show,
) -> None:
    """Does the work of a command: reports the result, turns errors into a status."""
    console = Console(stderr=True)
    _quiet_libraries(verbose)
    try:
        # Whatever a library prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            result = work(console)
    except (Exception, KeyboardInterrupt) as error:  # The outermost boundary: all ends in a status.
        if verbose:
            traceback.print_exc()
        status = getattr(error, "exit_status", 1)
        message = _message(error)
        if isinstance(error, KeyboardInterrupt):
            status, message = 130, "Interrupted. Run the same command again to go on."
        if as_json:
            print(json.dumps(_failed(name, error, message, status)))
        console.print(f"kith {name}: {message}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(status) from error
    if as_json:
        print(json.dumps({"command": name, "status": "done", **result}, ensure_ascii=False))
    else:
        show(result, Console(soft_wrap=True))


def _failed(name: str, error: BaseException, message: str, status: int) -> dict[str, Any]:
    return {
        "command": name,
        "status": "failed",
        "exit_status": status,
        "error": {"kind": type(error).__name__, "message": message},
    }


def _message(error: BaseException) -> str:
    if isinstance(error, KithError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}. Check the path and its permissions; --verbose shows where this happened."
    return (
        f"Unexpected {type(error).__name__}: {error}. Nothing was published. This may be a defect of "
        "Kith; --verbose shows where it happened."
    )


def _open_session(
    config_path: str, overrides: list[str] | None, console: Console
) -> tuple["Config", "Session"]:
    # Beam warns on import about packages that Kith does not use.
    with _silence(logging.ERROR):
        from pipelines.config_loading import load_config
        from pipelines.runners import RunnerSpec
        from pipelines.stage import Session
    config = load_config(config_path, overrides or ())
    return config, Session(RunnerSpec(config.runner, _beam_options), console)


@contextlib.contextmanager
def _silence(level: int) -> Any:
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _quiet_libraries(verbose: bool) -> None:
    """Leaves standard error to Kith's own messages, unless --verbose asks for everything."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    if not verbose:
        warnings.filterwarnings("ignore")
        # A failing step is logged with its traceback; Kith reports the failure itself.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)


def _show_paths(result: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        table.add_row(key, str(value))
    console.print(table)


def _show_plan(result: dict[str, Any], console: Console) -> None:
    from pipelines.plan_report import show_plan

    show_plan(result, console)


@app.command()
def nightly(
    config: ConfigOption,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run every stage, check the gates, publish."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.nightly import run_nightly

        result = run_nightly(config, session)
        return {
            "run": result.run,
            "run_path": result.run_path,
            "report_path": result.report_path,
            "pointer_path": result.pointer_path,
        }

    def show(result: dict[str, Any], console: Console) -> None:
        from pipelines.summary import summary_table

        console.print(summary_table(result["run"]))
        if result["report_path"]:
            console.print(f"Open this page: {result['report_path']}", markup=False)

    _run("nightly", config, overrides, as_json, verbose, command, show)


@app.command()
def embed(
    config: ConfigOption,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="DATASET",
            help="Try again only what failed in this embeddings dataset; take over the rest.",
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Embed the catalogue's images: writes the embeddings and failures datasets."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        import dataclasses

        from pipelines.embed_images import embed_images
        from pipelines.preflight import check_environment, check_inputs
        from pipelines.runners import workspace_lock

        check_environment()
        check_inputs(config)
        with workspace_lock(config.workspace):
            result = embed_images(config, session, replay)
        return {
            "images": dataclasses.asdict(result.books),
            "embeddings": result.embeddings.folder,
            "failures": result.failures.folder,
            **_stage_figures(result.embeddings),
        }

    _run("embed", config, overrides, as_json, verbose, command, _show_paths)


def _stage_figures(dataset: Any) -> dict[str, Any]:
    described = dataset.describe()
    names = ("state", "rows", "bytes", "seconds", "counters", "predicted", "actual")
    return {name: described[name] for name in names if name in described}


@app.command()
def build(
    config: ConfigOption,
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
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train and shard the FAISS index of an embeddings dataset."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.build_index import build_index, merge_index
        from pipelines.locate import find_embeddings
        from pipelines.plan_report import plan_build
        from pipelines.preflight import check_workspace
        from pipelines.runners import workspace_lock

        folder, failures = (embeddings, None) if embeddings else find_embeddings(config)
        if plan:
            return plan_build(config, folder)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            index = build_index(config, session, folder, failures)
            merged = {"merged": merge_index(session, index.folder, merge)} if merge else {}
        names = ("shards", "nlist", "nprobe", "dim", "empty_lists", "imbalance")
        properties = index.manifest.properties
        figures = {name: properties[name] for name in names}
        return {"index": index.folder, **merged, "figures": figures, **_stage_figures(index)}

    _run("build", config, overrides, as_json, verbose, command, _show_plan if plan else _show_paths)


@app.command()
def join(
    config: ConfigOption,
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
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the k best neighbours of every item of an index."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from index_builder.errors import ConfigError
        from index_builder.neighbors import STATUSES
        from pipelines.join_neighbors import join_neighbors
        from pipelines.join_queries import join_queries
        from pipelines.locate import find_index
        from pipelines.plan_report import plan_join
        from pipelines.preflight import check_workspace
        from pipelines.runners import workspace_lock

        if limit_ids and not queries:
            raise ConfigError("--limit-ids takes images of --queries, which is missing. Add it.")
        if plan and queries:
            raise ConfigError("--plan plans a join of the index with itself. Leave --queries out.")
        folder = index or find_index(config)
        if plan:
            return plan_join(config, folder)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            if queries:
                asked = join_queries(config, session, folder, queries, limit_ids)
                found, made = asked.neighbors, {"queries": asked.queries.folder}
            else:
                found, made = join_neighbors(config, session, folder), {}
        names = ("pairs", *STATUSES, "filtered", "widened", "fan_out")
        figures = {name: found.manifest.properties[name] for name in names}
        return {"neighbors": found.folder, **made, "figures": figures, **_stage_figures(found)}

    _run("join", config, overrides, as_json, verbose, command, _show_plan if plan else _show_paths)


@app.command()
def groups(
    config: ConfigOption,
    index: IndexOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find groups of near-duplicates in an index."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.find_groups import find_groups
        from pipelines.locate import find_index
        from pipelines.preflight import check_workspace
        from pipelines.run_manifest import GROUP_FIGURES
        from pipelines.runners import workspace_lock

        folder = index or find_index(config)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            found = find_groups(config, session, folder)
        figures = {name: found.manifest.properties[name] for name in GROUP_FIGURES}
        return {"groups": found.folder, "figures": figures, **_stage_figures(found)}

    _run("groups", config, overrides, as_json, verbose, command, _show_paths)


@app.command()
def graph(
    config: ConfigOption,
    index: IndexOption = None,
    neighbors: NeighborsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Turn neighbours around: mutual and reverse neighbours, hubness."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.locate import find_index, find_neighbors
        from pipelines.neighbor_graph import neighbor_graph
        from pipelines.preflight import check_workspace
        from pipelines.run_manifest import GRAPH_FIGURES
        from pipelines.runners import workspace_lock

        index_folder = index or find_index(config)
        folder = neighbors or find_neighbors(config, index_folder)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            made = neighbor_graph(config, session, index_folder, folder)
        figures = {name: made.manifest.properties[name] for name in GRAPH_FIGURES}
        return {"graph": made.folder, "figures": figures, **_stage_figures(made)}

    _run("graph", config, overrides, as_json, verbose, command, _show_paths)


@app.command()
def export(
    config: ConfigOption,
    neighbors: NeighborsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write neighbours as Parquet and JSONL for a warehouse or key-value store."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.export_neighbors import export_neighbors
        from pipelines.locate import find_neighbors
        from pipelines.preflight import check_workspace
        from pipelines.runners import workspace_lock

        folder = neighbors or find_neighbors(config, None)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            written = export_neighbors(config, session, folder)
        pairs = written.manifest.properties["pairs"]
        return {"export": written.folder, "pairs": pairs, **_stage_figures(written)}

    _run("export", config, overrides, as_json, verbose, command, _show_paths)


@app.command()
def evaluate(
    config: ConfigOption,
    index: IndexOption = None,
    neighbors: NeighborsOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure recall against exact neighbours, and hits on known right answers."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.evaluate_neighbors import (
            check_recall,
            evaluate_neighbors,
            read_evaluation,
        )
        from pipelines.locate import find_embeddings, find_index, find_neighbors
        from pipelines.preflight import check_workspace
        from pipelines.runners import workspace_lock

        index_folder = index or find_index(config)
        source = None if index else find_embeddings(config)[0]
        folder = neighbors or find_neighbors(config, index_folder)
        check_workspace(config.workspace)
        with workspace_lock(config.workspace):
            measured = evaluate_neighbors(config, session, index_folder, folder, source)
        figures = read_evaluation(measured)
        check_recall(figures, config.evaluate.min_recall)
        return {
            "evaluation": measured.folder,
            "recall": figures["recall"],
            "truth": figures["truth"],
            **_stage_figures(measured),
        }

    _run("evaluate", config, overrides, as_json, verbose, command, _show_paths)


@app.command()
def search(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images to look for.")],
    config: ConfigOption,
    index: IndexOption = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of each image.")] = 10,
    nprobe: Annotated[
        int | None, typer.Option("--nprobe", min=1, help="Lists to search; default: the index's.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="Metadata to show; default: export.columns. Repeatable."),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Embed new images and print their nearest items of the published index."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from index_builder import shards
        from pipelines.publish import require_published
        from pipelines.search_images import search_images

        folder = index or require_published(config.workspace, shards.KIND)
        shown = tuple(columns) if columns else config.export.columns
        results = search_images(config, folder, images, k, nprobe, shown)
        return {"index": folder, "results": [result.to_json() for result in results]}

    def show(result: dict[str, Any], console: Console) -> None:
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

    _run("search", config, overrides, as_json, verbose, command, show)


@app.command()
def report(
    config: ConfigOption,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the published run.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Default: in the run's folder.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the HTML page of a run again."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.report.build import rewrite_report

        return {"report_path": rewrite_report(config, run, output)}

    _run("report", config, overrides, as_json, verbose, command, _show_paths)


@app.command()
def check(
    config: ConfigOption,
    data: Annotated[
        bool, typer.Option("--data", help="Also verify the checksums of all published files.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check the environment, the configuration and its paths, without any work."""

    def command(config: "Config", session: "Session") -> dict[str, Any]:
        from pipelines.check import check_everything

        return check_everything(config, data)

    _run("check", config, overrides, as_json, verbose, command, _show_paths)


@app.command(name="convert-weights")
def convert_weights(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE.pth", help="What torch.save wrote of a state dict.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET.weights.h5", help="The new file, for encoder.weights.")
    ],
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            metavar="NAME",
            help="efficientnet_lite0 or efficientnet_lite0_pytorch; default: by the tensors' names.",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert PyTorch weights of EfficientNet-Lite0 into a Keras weights file."""

    def work(console: Console) -> dict[str, Any]:
        from pipelines.convert_weights import convert_weights

        return convert_weights(source, target, network)

    _report("convert-weights", as_json, verbose, work, _show_paths)


@app.command(name="import-vectors")
def import_vectors(
    paths: Annotated[
        list[str], typer.Argument(metavar="PARQUET...", help="Files or globs with vectors and ids.")
    ],
    output: Annotated[
        str,
        typer.Option("--output", metavar="DIR", help="The new dataset, for kith build --embeddings."),
    ],
    id_column: Annotated[str, typer.Option("--id-column", help="Text or whole numbers.")] = "id",
    vector_column: Annotated[
        str, typer.Option("--vector-column", help="Lists of floats, all of one length.")
    ] = "vector",
    item_column: Annotated[
        str | None,
        typer.Option("--item-column", help="The item that a row shows; default: the row is its own."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", help="Metadata to take; default: all other columns. Repeatable."),
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option(help="Vectors of unit length in float16; else as they are, in float32."),
    ] = True,
    encoder: Annotated[
        str, typer.Option("--encoder", metavar="NAME", help="What made them; only equal names compare.")
    ] = "imported",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make an embeddings dataset of vectors that were made elsewhere."""

    def work(console: Console) -> dict[str, Any]:
        from index_builder import embeddings, manifests
        from index_builder.importing import import_vectors

        folder = import_vectors(
            paths,
            output,
            id_column=id_column,
            vector_column=vector_column,
            item_column=item_column,
            columns=columns or None,
            normalize=normalize,
            encoder=encoder,
        )
        made = manifests.load(folder, embeddings.KIND)
        return {"embeddings": folder, "rows": made.rows, "dim": made.properties["dim"]}

    _report("import-vectors", as_json, verbose, work, _show_paths)


if __name__ == "__main__":
    main()
