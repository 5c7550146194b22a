"""The table that shows what checks found."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runner.findings import Finding, Status

STYLES = {Status.ok: "green", Status.warn: "yellow", Status.fail: "bold red"}


def make_console() -> Console:
    """Colours and width of the terminal; plain, wide lines where the output is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


def show(title: str, findings: Iterable[Finding], console: Console) -> int:
    """Print the table; 1 when anything failed, else 0."""
    rows = list(findings)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "", "found", "fix"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(escape(row.name), f"[{STYLES[row.status]}]{row.status.value}[/]", escape(row.found), escape(row.fix))
    console.print(table)
    failed = [row.name for row in rows if row.status is Status.fail]
    warned = sum(row.status is Status.warn for row in rows)
    if failed:
        console.print(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}", style="bold red", markup=False)
    else:
        console.print(f"all {len(rows)} checks passed" + (f", {warned} with a warning" if warned else ""), style="green")
    return 1 if failed else 0
