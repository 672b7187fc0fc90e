"""Options that several commands take, so that each is called and explained alike everywhere."""

from typing import Annotated

import typer

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
