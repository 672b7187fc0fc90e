"""Getting vectors: of the catalogue's images, of other programs, and of other programs' weights."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.answers import Answer, stage_figures
from pipelines.commands.running import configured, unconfigured

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session


@configured
def embed(
    config: "Config",
    session: "Session",
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="DATASET",
            help="Try again only what failed in this embeddings dataset; take over the rest.",
        ),
    ] = None,
) -> Answer:
    """Embed the catalogue's images: writes the embeddings and failures datasets."""
    import dataclasses

    from pipelines.embed_images import embed_images
    from pipelines.preflight import check_environment, check_inputs
    from pipelines.runners import workspace_lock

    check_environment()
    check_inputs(config)
    with workspace_lock(config.workspace):
        result = embed_images(config, session, replay)
    return Answer(
        {
            "images": dataclasses.asdict(result.books),
            "embeddings": result.embeddings.folder,
            "failures": result.failures.folder,
            **stage_figures(result.embeddings),
        }
    )


@unconfigured
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
) -> Answer:
    """Convert PyTorch weights of EfficientNet-Lite0 into a Keras weights file."""
    from pipelines.convert_weights import convert_weights

    return Answer(convert_weights(source, target, network))


@unconfigured
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
) -> Answer:
    """Make an embeddings dataset of vectors that were made elsewhere."""
    from index_builder.datasets import embeddings, manifests
    from index_builder.steps.importing import import_vectors

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
    return Answer({"embeddings": folder, "rows": made.rows, "dim": made.properties["dim"]})
