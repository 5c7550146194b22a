"""Every family's twin (twins.py) in three steps of RL, as typed: trainer=torch, rollout=local, R3 where it has routers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.__main__ import main
from tests import twins

pytestmark = pytest.mark.slow
ONE_OF_EACH = twins.one_of_each_family()
SHORT = [
    "run=toy", "task=arithmetic", "steps=3", "tracking=none", "trainer.threads=1", "speculative=none",
    "warm_start.max_steps=1", "warm_start.check_interval_steps=1", "warm_start.cache=false", "evaluation.interval_steps=0",
    "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "rollout.sampling.max_response_tokens=16",
    "precision=int4_qat", "precision.group_size=32", "mismatch.decompose_interval_steps=1", "mismatch.decompose_samples=4",
]  # fmt: skip


def run(*words: str) -> None:
    command = [sys.executable, "-m", "runner", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_three_steps_and_back_to_a_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that trainer and engine agree on at every step, and an export of INT4 that an audit finds nothing wrong with."""
    model = twins.twin(tmp_path / "source", name)
    chosen = ["model=auto", f"model.hf_checkpoint={tmp_path / 'source'}"]
    run(*chosen, *SHORT, f"outputs_dir={tmp_path}", "run_name=first")
    steps = metrics(tmp_path / "first")
    assert len(steps) == 3
    for step in steps:
        assert step["train/train_rollout_logprob_abs_diff"] < 0.02
        assert ("router_replay/disagreement" in step) == bool(model.num_experts)
    assert main(["export", f"run={tmp_path / 'first'}", f"target={tmp_path / 'out'}", "format=int4"]) == 0
    assert main(["audit", str(tmp_path / "out"), "precision=int4_qat", "precision.group_size=32"]) == 0
    assert "no differences" in capsys.readouterr().out
    exported, source = twins.weights_of(tmp_path / "out"), twins.weights_of(tmp_path / "source")
    assert {key for key in exported if not key.startswith("model.layers")} == {
        key for key in source if not key.startswith("model.layers")
    }
