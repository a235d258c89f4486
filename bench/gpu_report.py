"""Tables of what `bench.gpu` measured."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = ("case", "arm", "us: median (p10 .. p90)", "x best other (p10 .. p90)", "bandwidth", "FLOPs", "error")


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """One table a part, in the order of the rows; what failed or is missing stands in it with its reason."""
    console = Console(width=max(Console().width, 200))  # as wide as it needs to be, also in a file
    for part in dict.fromkeys(row["part"] for row in rows):
        table = Table(title=f"{part}; ratios above 1: ours is faster; shares of the device's peak")
        for heading in HEADINGS:
            table.add_column(heading, no_wrap=True)
        for row in rows:
            if row["part"] == part:
                table.add_row(*cells(row))
        console.print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """One row, as it stands in the table."""
    reason = row.get("failed") or row.get("skipped")
    if reason:
        return [row["case"], row["arm"], str(reason)[:80]]
    ratio = f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} .. {row['ratio_p90']:.2f})" if "ratio" in row else ""
    best = f" {row['best_rival']}" if "best_rival" in row else ""
    return [
        row["case"],
        row["arm"],
        f"{row['us']:.4g} ({row['us_p10']:.4g} .. {row['us_p90']:.4g})",
        ratio + best,
        f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else "",
        f"{row['flop_share']:.0%}" if "flop_share" in row else "",
        f"{row['error']:.1e}" if "error" in row else "",
    ]
