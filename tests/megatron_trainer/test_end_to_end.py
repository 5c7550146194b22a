"""The command line with Megatron ranks: a short run, its resume, its INT4 export, and what audit says about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run_folders import unclocked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def _runner(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "runner", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.megatron
@pytest.mark.timeout(600)
def test_run_resume_export_audit(tmp_path: Path) -> None:
    overrides = [
        "trainer=megatron", "parallelism=cpu2", "tracking=none", f"outputs_dir={tmp_path}", "run_name=tp2", "steps=2",
        "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "checkpoint.interval_steps=1",
        "warm_start.max_steps=10", "warm_start.check_interval_steps=10", "warm_start.stop_at_reward=0.0",
        "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=1", "mismatch.decompose_samples=4",
        "trainer.async_save=true",
    ]  # fmt: skip
    _runner(*overrides)
    folder = tmp_path / "tp2"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and unclocked(rows) < 0.02
    for row in rows:
        assert row["train/nan_steps"] == 0
        assert row["train/train_rollout_logprob_abs_diff"] < 0.05, "the engine computes with other weights than the trainer"
        assert row["router_replay/disagreement"] < 0.2
    _runner(f"resume={folder}", "steps=3", f"outputs_dir={tmp_path}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and json.loads((folder / "status.json").read_text())["state"] == "completed"
    _runner("export", f"run={folder}", f"target={tmp_path / 'int4'}", "format=int4", "parallelism=single")
    _runner("export", f"run={folder}", f"target={tmp_path / 'bf16'}", "format=bf16")
    converted = tmp_path / "converted"
    _runner("convert", f"source={tmp_path / 'bf16'}", f"target={converted}", "precision=int4_qat", "precision.group_size=32")
    assert "no differences" in _runner("audit", str(tmp_path / "int4"), str(converted)).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_steps_are_those_of_the_torch_trainer(tmp_path: Path) -> None:
    """int4_qat with R3 from the same weights, a warm-started policy: two tensor-parallel ranks against one process.

    The engine gets the same integers from both, so the first rollouts are equal. Then bf16 rounds differently in the two
    forwards (seen: gradient norms by 1.5 %, entropies by 0.5 %), and by the second or third step (it depends on the CPU's
    kernels) a weight's integer, and a sample: from there on the updates are those of different samples.
    """
    small = ["steps=1", "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "warm_start.max_steps=200"]
    common = [
        f"outputs_dir={tmp_path}", "tracking=none", "trainer.threads=1", "speculative=none", "evaluation.interval_steps=0",
        "mismatch.decompose_interval_steps=0", "model=tiny_moe", "precision=int4_qat", "router_replay=r3",
        "trainer.optimizer.lr_warmup_steps=0",
    ]  # fmt: skip
    _runner("run_name=start", *common, *small, "warm_start.stop_at_reward=0.15")
    _runner("export", f"run={tmp_path / 'start'}", f"target={tmp_path / 'hf'}", "format=bf16")
    first = ["steps=3", "algorithm.prompts_per_step=8", "algorithm.samples_per_prompt=8", "warm_start.enabled=false"]
    rows = []
    for name, choice in (("torch", ["trainer=torch"]), ("megatron", ["trainer=megatron", "parallelism=cpu2"])):
        _runner(f"run_name={name}", *choice, *common, *first, f"model.hf_checkpoint={tmp_path / 'hf'}")
        rows.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert rows[0][0]["rollout/zero_std"] < 1 and rows[0][0]["train/grad_norm"] > 0.05, "nothing to learn from"
    for theirs, ours in zip(*rows, strict=True):
        same_samples = all(ours[key] == theirs[key] for key in theirs if key.startswith("rollout/"))
        assert same_samples or theirs["step"] > 0
        assert ours["rollout/raw_reward"] == pytest.approx(theirs["rollout/raw_reward"], abs=0.1)
        if same_samples:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-3)
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.05)
            assert ours["train/entropy_loss"] == pytest.approx(theirs["train/entropy_loss"], rel=0.03)
            assert ours["sync/changed_integers"] == pytest.approx(theirs["sync/changed_integers"], rel=0.05)
        assert max(row["train/train_rollout_logprob_abs_diff"] for row in (ours, theirs)) < 0.01
        assert max(row["router_replay/disagreement"] for row in (ours, theirs)) < 0.02


@pytest.mark.megatron
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """A terminal sends Ctrl-C, and a scheduler SIGTERM, to the driver and to its ranks alike: the ranks still have to save."""
    command = [
        sys.executable, "-m", "runner", "trainer=megatron", "tracking=none", f"outputs_dir={tmp_path}", "run_name=group",
        "steps=1000", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=4", "checkpoint.interval_steps=0",
        "warm_start.enabled=false", "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0",
    ]  # fmt: skip
    folder, log = tmp_path / "group", tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    os.killpg(process.pid, number)
    assert process.wait(timeout=120) == 130, log.read_text()[-2000:]
    assert "is complete. Continue with" in log.read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
