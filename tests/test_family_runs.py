"""Every family's twin (twins.py) in three steps of RL, as typed: trainer=torch, rollout=local, R3 where it has routers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mxfp4Config

from runner.__main__ import main
from runner.config.schema import ModelConfig
from tests import twins

pytestmark = pytest.mark.slow
ONE_OF_EACH = twins.one_of_each_family()
SHORT = [
    "run=toy", "task=arithmetic", "steps=3", "tracking=none", "trainer.threads=1", "speculative=none",
    "warm_start.max_steps=1", "warm_start.check_interval_steps=1", "warm_start.cache=false", "evaluation.interval_steps=0",
    "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4", "rollout.sampling.max_response_tokens=16",
    "mismatch.decompose_interval_steps=1", "mismatch.decompose_samples=4",
]  # fmt: skip
INT4 = ["precision=int4_qat", "precision.group_size=32"]


def run(*words: str) -> None:
    command = [sys.executable, "-m", "runner", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def three_steps_and_back(folder: Path, model: ModelConfig, precision: list[str]) -> None:
    """A run from folder/source, and its export to folder/out."""
    chosen = ["model=auto", f"model.hf_checkpoint={folder / 'source'}", *precision]
    run(*chosen, *SHORT, f"outputs_dir={folder}", "run_name=first")
    steps = metrics(folder / "first")
    assert len(steps) == 3
    for step in steps:
        assert step["train/train_rollout_logprob_abs_diff"] < 0.02
        assert ("router_replay/disagreement" in step) == bool(model.num_experts)
    assert main(["export", f"run={folder / 'first'}", f"target={folder / 'out'}"]) == 0
    assert main(["audit", str(folder / "out"), *precision]) == 0


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_three_steps_and_back_to_a_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that trainer and engine agree on at every step, and an export of INT4 that an audit finds nothing wrong with."""
    three_steps_and_back(tmp_path, twins.twin(tmp_path / "source", name), INT4)
    assert "no differences" in capsys.readouterr().out
    exported, source = twins.weights_of(tmp_path / "out"), twins.weights_of(tmp_path / "source")
    assert {key for key in exported if not key.startswith("model.layers")} == {
        key for key in source if not key.startswith("model.layers")
    }


def test_mxfp4_as_published_in_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gpt-oss: quantized once per update from an MXFP4 source, and exported as that lies there."""
    three_steps_and_back(tmp_path, twins.mxfp4_twin(tmp_path / "source"), ["precision=mxfp4_qat"])
    assert "no differences" in capsys.readouterr().out
    shapes = [
        {name: (weight.shape, weight.dtype) for name, weight in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("source", "out")
    ]
    assert shapes[0] == shapes[1]
    loaded = twins.loaded_by_transformers(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    assert all(torch.isfinite(weight).all() for weight in loaded.state_dict().values())
