"""The command line: `kith` and the list of its commands."""

import sys

import typer

from pipelines.commands.neighbors import build, graph, groups, join
from pipelines.commands.results import evaluate, export, search
from pipelines.commands.runs import check, nightly, report
from pipelines.commands.vectors import convert_weights, embed, import_vectors

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

# In the order in which `kith --help` lists them.
for command in (
    nightly,
    embed,
    build,
    join,
    groups,
    graph,
    export,
    evaluate,
    search,
    report,
    check,
    convert_weights,
    import_vectors,
):
    app.command(command.__name__.replace("_", "-"))(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    arguments, beam_options = split_beam_options(sys.argv[1:] if arguments is None else arguments)
    # Some libraries look for their own flags on the command line.
    sys.argv = sys.argv[:1]
    app(args=arguments, prog_name="kith", obj=beam_options)


def split_beam_options(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Splits a command line at the first `--`: Kith's own arguments, and Beam's options."""
    if "--" not in arguments:
        return arguments, ()
    place = arguments.index("--")
    return arguments[:place], tuple(arguments[place + 1 :])


if __name__ == "__main__":
    main()
