"""The tables of docs/gpus.md: `python -m tests.gpu_table` writes them from the reports of `doctor gpu` that lie in
benchmarks/results/gpu/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.findings import Status

ROOT = Path(__file__).parents[1]
PAGE, REPORTS = ROOT / "docs" / "gpus.md", ROOT / "benchmarks" / "results" / "gpu"
BEGIN, END = "<!-- reports: python -m tests.gpu_table -->", "<!-- end of reports -->"
NONE = "None: no GPU has run `doctor gpu`."
HEAD = ("card", "date", "code", "torch, CUDA", "versions of the lock", "checks", "what failed")


def reports(folder: Path) -> list[dict[str, Any]]:
    """What `doctor gpu` wrote, the newest first."""
    found = [json.loads(path.read_text()) for path in folder.glob("doctor-gpu-*.json")]
    return sorted(found, key=lambda report: report["date"], reverse=True)


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    graded = [Status(line["status"]) for line in report["findings"]]
    failed = [line["check"] for line in report["findings"] if line["status"] == Status.fail.value]
    counts = ", ".join(f"{graded.count(status)} {status.value}" for status in Status if status in graded)
    git = report["code"]  # None outside a repository
    code = f"{git['commit'][:10]}{', changed' * git['dirty']}" if git else "unknown"
    return (
        f"{report['card']} ({report['compute_capability']})", report["date"], code, f"{report['torch']}, {report['cuda']}",
        "yes" if report["as_locked"] else "no", counts, ", ".join(failed) or "nothing",
    )  # fmt: skip


def tables(folder: Path = REPORTS) -> str:
    """One row per report, then every check of every report."""
    found = reports(folder)
    if not found:
        return NONE
    parts = [_table(HEAD, [_row(report) for report in found])]
    for report in found:
        lines = [(line["check"], line["status"], line["found"]) for line in report["findings"]]
        packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
        title = f"### {report['card']}, {report['date']}\n\n{packages}; {report['seconds']:.0f} s"
        parts += [title, _table(("check", "", "found"), lines)]
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
