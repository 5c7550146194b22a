"""The verbs `doctor` and `doctor engine`."""

from __future__ import annotations

from rich.console import Console

from runner.doctor.findings import make_console, show
from runner.schema import Config


def main(cfg: Config, what: str = "machine", console: Console | None = None) -> int:
    """`what`: machine or engine. 0 when nothing failed, else 1."""
    console = console or make_console()
    if what == "machine":
        from runner.doctor.machine import check_machine

        return show("This machine", check_machine(cfg), console)
    if what == "engine":
        from runner.doctor.engine import check_engine

        return check_engine(cfg, console)
    from runner.errors import UserError

    raise UserError(f"doctor has no part {what!r}", fix="python -m runner doctor, or python -m runner doctor engine")
