"""What is installed against the locks, and imports in processes of their own before a run on GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.config import packages, preflight
from runner.config.packages import LOCK_CPU, LOCK_GPU, failures, from_lock, locked, tool, version_of
from runner.doctor import machine
from runner.errors import UserErrors
from runner.findings import Status
from runner.rollout.sglang import machine as sglang_machine
from runner.rollout.sglang import warm
from tests.configs import composed

ON_A_GPU = ("parallelism=h200x1", "rollout=sglang", "trainer=megatron")


def test_modules_that_do_not_import_are_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels.py").write_text("raise ImportError('x.so: undefined symbol: c10_check')\n")
    (tmp_path / "silent_kernels.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "slow_kernels.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert dict(failures(["json", "broken_kernels", "silent_kernels"])) == {
        "broken_kernels": "ImportError: x.so: undefined symbol: c10_check",
        "silent_kernels": "exit code 3",
    }
    assert list(failures(["slow_kernels"], seconds=0.5)) == [("slow_kernels", "not imported within 0 s")]
    assert not list(failures([]))


def test_versions_are_held_against_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locked(LOCK_GPU)["torch"] == "2.14.1" and locked(LOCK_CPU)["torch"] == "2.13.0"
    monkeypatch.setattr(packages, "version_of", lambda name: "0.0.1" if name == "torch" else None)
    assert from_lock("torch", LOCK_GPU) == "torch 0.0.1, the lock has 2.14.1"
    assert from_lock("no-such-package", LOCK_GPU) == "no-such-package not installed"


def test_a_compiler_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv" / "python"))
    assert tool("nvcc") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert tool("nvcc") == str(tmp_path / "bin" / "nvcc")


def test_a_run_on_a_gpu_asks_for_what_it_will_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed(*ON_A_GPU)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 1)
    monkeypatch.setattr(preflight, "installed", lambda module: True)
    asked: list[str] = []

    def one_fails(modules: dict[str, object]) -> list[tuple[str, str]]:
        asked.extend(modules)
        return [("sgl_kernel", "undefined symbol")]

    monkeypatch.setattr(preflight, "failures", one_fails)
    monkeypatch.setattr(sglang_machine, "tool", lambda name: None)
    with pytest.raises(UserErrors) as caught:
        preflight.check(cfg)
    assert set(asked) == {"sgl_kernel", "torch_memory_saver", "transformer_engine.pytorch"}
    text = str(caught.value)
    assert "sgl_kernel does not load (sglang-kernel" in text and "make setup-gpu" in text
    assert "INT4 kernels with nvcc" in text and "INT4 kernels with ninja" in text


def test_nothing_is_imported_for_a_run_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "failures", lambda modules: pytest.fail("asked") if modules else [])
    preflight.check(composed())


def test_the_doctor_says_which_kernels_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "visible_gpus", lambda: 1)
    monkeypatch.setattr(machine, "has_module", lambda module: True)
    monkeypatch.setattr(machine, "failures", lambda modules: [("sgl_kernel", "undefined symbol")])
    found = {finding.name: finding for finding in machine.gpu_packages(composed(*ON_A_GPU))}
    assert found["import sgl_kernel"].status is Status.fail and found["import sgl_kernel"].found == "undefined symbol"
    assert found["import transformer_engine.pytorch"].status is Status.ok
    monkeypatch.setattr(machine, "visible_gpus", lambda: 0)
    assert not list(machine.gpu_packages(composed(*ON_A_GPU)))


def test_the_doctor_names_packages_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = version_of("torch")  # of whichever lock this environment has
    monkeypatch.setattr(machine, "locked", lambda file: {"torch": torch, "rich": "0.0.1", "not-here": "1.0"})
    (finding,) = machine.locked_versions(composed())
    assert (
        finding.status is Status.warn
        and finding.found.startswith("1 of 2 packages as in constraints")
        and "rich" in finding.found
    )


def test_kernels_compile_at_the_same_time_and_a_failure_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    meet = (
        "import pathlib, time; p = pathlib.Path({!r}); p.joinpath('{}').touch()\nwhile not (p / '{}').exists(): time.sleep(0.01)"
    )
    both = {"a": meet.format(str(tmp_path), "a", "b"), "b": meet.format(str(tmp_path), "b", "a")}  # each waits for the other
    assert warm.compile_all(both) == 0
    assert warm.compile_all({"c": "raise SystemExit('nvcc fatal')"}) == 1
    assert "c: FAILED: nvcc fatal" in capsys.readouterr().out


def test_it_refuses_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warm, "visible_gpus", lambda: 0)
    assert warm.main() == 2 and "no GPU here" in capsys.readouterr().err


def test_the_modules_are_those_of_this_sglang() -> None:
    """SGLang's own functions, with as many arguments as it passes; nothing is compiled."""
    pytest.importorskip("sglang", reason="make setup-sglang")
    check = "import sglang.kernels.jit.utils as u\nu.load_jit = lambda name, *args, **kw: print(name, *args)\n"
    for code in warm.MODULES.values():
        done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0 and "marlin" in done.stdout, done.stderr
