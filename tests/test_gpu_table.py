"""docs/gpus.md shows the reports that lie in benchmarks/results/gpu/."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from runner.doctor import gpu
from runner.findings import Finding, Status
from tests import gpu_table as page


def test_the_page_is_what_the_reports_say() -> None:
    shown = page.PAGE.read_text().split(page.BEGIN)[1].split(page.END)[0].strip()
    assert shown == page.tables(), "python -m tests.gpu_table writes it anew"


def test_reports_in_the_folder_are_of_gpus() -> None:
    assert all(report["compute_capability"] and report["packages"] for report in page.reports(page.REPORTS))


def test_a_report_of_doctor_gpu_becomes_a_row_and_a_table(tmp_path: Path) -> None:
    def findings() -> Iterator[Finding]:
        yield Finding("INT4 kernels, bits", Status.ok, "45 of 45 cases")
        yield Finding("INT4 unpack", Status.warn, "70% of copy")
        yield Finding("SGLang fp8, flipped bit", Status.fail, "a|b")

    assert page.tables(tmp_path) == page.NONE
    about = gpu.card(torch.device("cpu")) | {"card": "H200", "compute_capability": "9.0", "cuda": "13.0"}
    for date, git in (("2026-12-02 10:00:00", {"commit": "0123456789abcdef", "dirty": True}), ("2026-12-03 10:00:00", None)):
        console = Console(file=io.StringIO())
        gpu.report({"all": findings}, tmp_path, about | {"date": date, "code": git}, console)
    lines = page.tables(tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| H200 (9.0) |")]
    assert [row.split(" | ")[1][:10] for row in rows] == ["2026-12-03", "2026-12-02"]
    assert "| unknown |" in rows[0] and "| 0123456789, changed |" in rows[1]
    assert all("1 ok, 1 warn, 1 FAIL | SGLang fp8, flipped bit |" in row for row in rows)
    assert lines.count("| SGLang fp8, flipped bit | FAIL | a\\|b |") == 2
    assert len([line for line in lines if line.startswith("### H200")]) == 2


def test_a_report_says_which_code_it_measured() -> None:
    code = gpu.card(torch.device("cpu"))["code"]
    assert code is None or len(code["commit"]) == 40
    assert json.dumps(code)
