"""Cores: the mask of the scheduler and a container's quota, in both versions of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import cores

V1 = "cpu,cpuacct/box/cpu.cfs"
CASES = [
    ("v2, two cores", "0::/\n", {"cpu.max": "200000 100000"}, 2.0),
    ("v2, no limit", "0::/\n", {"cpu.max": "max 100000"}, None),
    ("v2, a parent is tighter", "0::/pod/box\n", {"pod/cpu.max": "150000 100000", "pod/box/cpu.max": "400000 100000"}, 1.5),
    ("v2, the host's path is not mounted here", "0::/kubepods/pod1/box\n", {"cpu.max": "300000 100000"}, 3.0),
    ("v1", "4:memory:/x\n3:cpu,cpuacct:/box\n", {f"{V1}_quota_us": "50000", f"{V1}_period_us": "100000"}, 0.5),
    ("v1, no limit", "3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("nothing mounted", "0::/\n", {}, None),
    ("damaged", "0::/\n", {"cpu.max": "many"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("groups", "files", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_tightest_quota_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: float | None) -> None:
    membership = tmp_path / "membership"
    membership.write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cores.quota(tmp_path / "root", membership) == expected


@pytest.mark.parametrize(("limit", "expected"), [(None, 8), (2.0, 2), (2.9, 2), (0.5, 1), (64.0, 8)])
def test_available_cores_are_whole_and_at_least_one(monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int) -> None:
    monkeypatch.setattr(cores, "quota", lambda: limit)
    monkeypatch.setattr(cores, "schedulable_cores", lambda: 8)
    assert cores.available_cores() == expected


def test_torch_starts_no_more_threads_than_the_quota(tmp_path: Path) -> None:
    """A process whose control group allows one core, on a machine with more."""
    if cores.schedulable_cores() < 2:
        pytest.skip("one core")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "membership").write_text("0::/\n")
    code = f"""
from pathlib import Path
from runner import cores
cores.CGROUP_ROOT, cores.CGROUPS_OF_THIS_PROCESS = Path({str(tmp_path)!r}), Path({str(tmp_path / "membership")!r})
cores.respect_quota()
import torch
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for asked, expected in (({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")):
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment | asked, capture_output=True, text=True, timeout=120)
        assert result.stdout.strip() == expected, result.stderr


def test_a_number_of_threads_that_the_user_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    for asked, threads in (("", 8), ("3", 3), ("16", 8), ("0", 1), ("2,4", 2), ("many", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert cores.default_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cores.default_threads() == 8
