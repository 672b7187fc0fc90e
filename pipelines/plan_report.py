"""`kith build --plan` and `kith join --plan`: what a stage would take, without doing it."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from index_builder.datasets import embeddings, manifests
from index_builder.index.shards import open_index
from index_builder.steps import plan
from index_builder.steps.host_speed import measure_host
from pipelines.build_index import calibration_of
from pipelines.config import Config
from pipelines.join_neighbors import check_columns

# Each of the nine rates is measured for so long: with first calls, within ten seconds in all.
_CALIBRATION_SECONDS = 0.5


def plan_build(config: Config, embeddings_folder: str) -> dict[str, Any]:
    """Returns the plan of the index of an embeddings dataset, after measuring this host.

    A spec that cannot be built, or would take too much memory, is refused as by the build itself.
    """
    source = manifests.load(embeddings_folder, embeddings.KIND)
    spec = config.index_spec().resolve(source.rows, embeddings.load_dim(source), config.goal())
    described = plan.describe_source(embeddings_folder, source)
    calibration = calibration_of(config, spec)
    queries = 0 if calibration is None else calibration.most_queries(source.rows)
    plan.check_memory(spec, described, calibrated_on=queries)
    speed = measure_host(
        spec.rows, spec.dim, spec.nlist, spec.nprobe, spec.goal.k, config.workspace,
        _CALIBRATION_SECONDS,
    )  # fmt: skip
    return plan.plan_build(spec, described, speed, queries).to_json()


def plan_join(config: Config, index_folder: str) -> dict[str, Any]:
    """Returns the plan of the join of an index with itself, after measuring this host.

    Pairs and fan-out are counted from the probes that the index stores.
    """
    index = open_index(index_folder)
    spec = config.join_spec()
    check_columns(index, spec)
    manifests.require_files(index_folder, index.manifest)
    trained = index.trained
    speed = measure_host(
        index.layout.rows, trained.dim, trained.nlist, index.nprobe, spec.k, config.workspace,
        _CALIBRATION_SECONDS,
    )  # fmt: skip
    return plan.plan_join(index, plan.count_join_work(index), spec.k, speed).to_json()


def show_plan(result: Mapping[str, Any], console: Console) -> None:
    """Prints a plan for people."""
    table = Table(title=f"Plan of kith {result['stage']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("rows", f"{result['rows']:,}")
    for reason in result["reasons"]:
        table.add_row("", reason)
    table.add_section()
    for name, size in result["disk_bytes"].items():
        table.add_row(f"disk, {name}", readable_bytes(size))
    table.add_section()
    for step in result["steps"]:
        table.add_row(
            step["name"], f"{step['seconds']:,.1f} s, {readable_bytes(step['memory_bytes'])} of memory"
        )
    table.add_row("in all", f"{result['seconds']:,.1f} s, {readable_bytes(result['memory_bytes'])}")
    table.add_section()
    if "join_task_memory_bytes" in result:
        table.add_row("memory of a join task", readable_bytes(result["join_task_memory_bytes"]))
        table.add_row("memory limit of a task", readable_bytes(result["memory_limit_bytes"]))
    if "read_bytes" in result:
        table.add_row("bytes read", readable_bytes(result["read_bytes"]))
    guess = "" if result["stage"] == "join" else "about "
    table.add_row("pairs to score", f"{guess}{result['pairs']:,}")
    table.add_row("shards probed by a query shard", f"{guess}{result['fan_out']:,}")
    host = result["host"]
    table.add_row(
        "this host",
        f"{host['cores']} cores, {host['product32'] / 1e9:,.0f} GFLOP/s float32, "
        f"{host['joined_pairs'] / 1e6:,.1f} million pairs/s (measured in {host['seconds']:.1f} s)",
    )
    console.print(table)


def readable_bytes(size: float) -> str:
    """Returns a number of bytes in a unit that people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
