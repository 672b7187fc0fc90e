"""The table that ends a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def summary_table(run: Mapping[str, Any]) -> Table:
    """Returns the figures of a `run.json` as a table for people."""
    table = Table(title=f"Kith run {run['run_id']} ({run['status']})", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    images, index, join, recall = run["images"], run["index"], run["join"], run["recall"]
    table.add_row("images read", f"{images['read']:,}")
    table.add_row("embedded", f"{images['embedded']:,}")
    table.add_row("reused", f"{images['reused']:,}")
    table.add_row("failed", f"{images['failed']:,}")
    for reason, number in images["failed_by_reason"].items():
        table.add_row(f"  {reason}", f"{number:,}", style="yellow")
    if images["unreadable_regions"]:
        table.add_row("unreadable regions", f"{images['unreadable_regions']:,}", style="red")
    table.add_section()
    table.add_row("index shards", f"{index['shards']:,}")
    table.add_row("lists, probed", f"{index['nlist']:,}, {index['nprobe']:,}")
    table.add_row(f"recall@{recall['k']}", f"{recall['estimate']:.4f}")
    table.add_row(f"  lower bound ({recall['confidence']:.4g})", f"{recall['lower_bound']:.4f}")
    if run["truth"] is not None:
        truth = run["truth"]
        table.add_row(f"hit rate by {truth['column']} @1", f"{truth['hit_rate_at_1']:.4f}")
        table.add_row(f"hit rate by {truth['column']} @{truth['k']}", f"{truth['hit_rate_at_k']:.4f}")
    if run["duplicates"] is not None:
        groups = run["duplicates"]
        table.add_row("near-duplicates", f"{groups['grouped']:,} in {groups['groups']:,} groups")
    table.add_row("pairs joined", f"{join['pairs']:,}")
    if run["graph"] is not None:
        table.add_row("mutual neighbours", f"{run['graph']['mutual_share']:.1%}")
        table.add_row("items in no list", f"{run['graph']['unreached_share']:.1%}")
    if run["export"] is not None:
        table.add_row("pairs exported", f"{run['export']['pairs']:,}")
    table.add_section()
    for name, stage in run["stages"].items():
        table.add_row(f"{name} ({stage['state']})", f"{stage['seconds']:.1f} s")
    table.add_row("whole run", f"{run['seconds']:.1f} s")
    table.add_row("images a second", f"{images['per_second']:,.1f}")
    return table
