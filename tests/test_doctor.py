"""The doctor: a healthy machine passes, each planted fault is found and named."""

from __future__ import annotations

import io
import os
import resource
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from runner.config.choices import LauncherKind
from runner.config.schema import Config, CpuMatmul
from runner.doctor import machine
from runner.doctor.table import show
from runner.findings import Finding, Status
from tests.configs import composed

Usage = namedtuple("Usage", "total used free")


def laptop(outputs: Path) -> Config:
    return composed(outputs_dir=str(outputs), **{"cluster.host_memory_gib": 1.0})


def found(cfg: Config) -> dict[str, Finding]:
    return {finding.name: finding for finding in machine.check_machine(cfg)}


def test_this_machine_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out = io.StringIO()
    code = show(
        "This machine", machine.check_machine(laptop(tmp_path / "outputs")), Console(file=out, width=200, color_system=None)
    )
    assert code == 0, out.getvalue()
    assert list(tmp_path.iterdir()) == []
    for name in ("python", "pinned packages", "cores", "int4 matmul", "disk", "write permission", "/dev/shm", "open files"):
        assert name in out.getvalue()


def test_a_wrong_pin_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\nrequires-python = ">=3.99"\ndependencies = ["rich==0.0.1", "no-such-package==1.0"]\n')
    monkeypatch.setattr(machine, "PYPROJECT", pyproject)
    findings = found(laptop(tmp_path))
    assert findings["python"].status is Status.fail and ">=3.99" in findings["python"].found
    assert findings["rich"].status is Status.fail and findings["rich"].fix == "pip install 'rich==0.0.1'"
    assert findings["no-such-package"].status is Status.fail and "not installed" in findings["no-such-package"].found


def test_missing_gpus_fail_here_and_warn_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = composed("recipe=qwen3_30b_int4")
    cfg.cluster.launcher = LauncherKind.local
    (here,) = machine.devices(cfg)
    assert here.status is Status.fail and "wanted 8" in here.found and "scale=laptop" in here.fix
    cfg.cluster.launcher = LauncherKind.ray
    (away,) = machine.devices(cfg)
    assert away.status is Status.warn


def test_engines_and_trainers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_module", lambda name: False)
    cfg = composed("recipe=qwen3_30b_int4")
    findings = {f.name: f for f in machine.optional_parts(cfg)}
    assert findings["megatron-core"].status is findings["sglang"].status is Status.fail
    assert "triton" in findings["optional parts"].found and findings["optional parts"].status is Status.ok


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, Status.fail), (5.0, Status.warn), (500.0, Status.ok)])
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, status: Status) -> None:
    usage = Usage(10**12, 0, int(free_gib * 1024**3))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert found(laptop(tmp_path))["disk"].status is status


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a folder nobody may write to")
def test_outputs_where_nobody_may_write(tmp_path: Path) -> None:
    unwritable = Path("/proc/self") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid():
        unwritable.mkdir(mode=0o500)
    finding = {f.name: f for f in machine.outputs_folder(laptop(unwritable / "outputs"))}["write permission"]
    assert finding.status is Status.fail and "outputs_dir" in finding.fix


def test_limits_matter_when_many_processes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(64 * 1024**2, 0, 64 * 1024**2))
    cfg = laptop(tmp_path)
    assert next(machine.open_files(cfg)).status is Status.ok
    cfg.cluster.launcher = LauncherKind.ray
    assert next(machine.open_files(cfg)).fix == "ulimit -n 65536"
    assert next(machine.shared_memory(cfg)).status is Status.warn


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: int(1.5 * 1024**3))
    findings = {f.name: f for f in machine.cpu_and_memory(laptop(tmp_path))}
    assert findings["memory"].status is Status.fail
    monkeypatch.setattr(machine, "memory_limit", lambda: int(3.0 * 1024**3))
    cfg = laptop(tmp_path)
    cfg.cluster.host_memory_gib = 64.0
    memory = {f.name: f for f in machine.cpu_and_memory(cfg)}["memory"]
    assert memory.status is Status.warn and "cluster.host_memory_gib=3" in memory.fix


def test_wandb_online_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cfg = laptop(tmp_path)
    cfg.tracking = composed("tracking=wandb", **{"tracking.wandb_mode": "online"}).tracking
    assert found(cfg)["wandb mode"].status is Status.warn
    monkeypatch.setenv("WANDB_API_KEY", "given")
    assert found(cfg)["wandb mode"].status is Status.ok


def test_a_broken_kernel_is_a_failure_of_the_run_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("torch.ops.aten._weight_int4pack_mm_for_cpu", broken)
    assert next(machine.of_options(laptop(tmp_path))).status is Status.fail


def test_a_slow_way_of_multiplying_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = laptop(tmp_path)
    assert next(machine.bf16_matmul(cfg)).status is Status.ok
    monkeypatch.setattr("runner.precision.cpu_matmul.has_bf16_instructions", lambda: False)
    monkeypatch.setattr("runner.precision.cpu_matmul.measure", lambda: 30.0)
    cfg.precision.cpu_matmul = CpuMatmul.native
    finding = next(machine.bf16_matmul(cfg))
    assert finding.status is Status.warn and "precision.cpu_matmul=auto" in finding.fix


def test_a_check_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cfg: Config) -> None:
        raise ValueError("odd machine")

    monkeypatch.setattr(machine, "memory_limit", broken)
    finding = found(laptop(tmp_path))["cpu and memory"]
    assert finding.status is Status.fail and "odd machine" not in finding.fix


def test_exit_code_and_summary() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    assert show("t", [Finding("a", Status.ok, "x"), Finding("b", Status.warn, "y", "do z")], console) == 0
    assert "all 2 checks passed, 1 with a warning" in out.getvalue() and "do z" in out.getvalue()
    assert show("t", [Finding("a", Status.ok, "x"), Finding("b", Status.fail, "y", "do z")], console) == 1
    assert "1 of 2 checks failed: b" in out.getvalue()
