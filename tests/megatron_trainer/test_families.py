"""Checkpoints of every kind that the torch trainer takes, on one Megatron rank: the same logprobs and the same first updates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import write_source

from runner.config.schema import Config, ModelConfig, QatPlacement
from runner.trainer.megatron.shares import Division
from runner.trainer.share import steps
from runner.trainer.torch.trainer import TorchTrainer
from tests import twins
from tests.megatron_trainer.configs import MODELS, megatron_config
from tests.megatron_trainer.scenario import batch
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
FP32 = {"format": "bf16", "precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}  # as Qwen3's cards say, at toy length
DEEPSEEK_YARN = YARN | {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BIASES: dict[str, Any] = {"attention_bias": True}
GROUPS: dict[str, Any] = {"num_experts": 8, "experts_top_k": 4, "expert_groups": 4, "expert_groups_top_k": 2}
# model of MODELS, changes of its numbers, changes of config.json
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3 yarn": ("dense", {}, {"rope_scaling": YARN}),
    "qwen3 yarn with a factor of its own": ("dense", {}, {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4}}),
    "qwen3 linear, old name": ("dense", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "qwen3_moe llama3": ("moe", {}, {"rope_scaling": LLAMA}),
    "qwen3 biases": ("dense", BIASES, {}),
    "qwen3_moe biases, untied": ("moe", BIASES | {"tied_embeddings": False}, {}),
    "qwen3_moe, first layer dense": ("moe", {"num_dense_layers": 1}, {}),
    "deepseek yarn": ("mla_q", {}, {"rope_scaling": DEEPSEEK_YARN}),
    "deepseek yarn without mscale": ("mla", {}, {"rope_scaling": YARN}),
    "deepseek yarn, one mscale": ("mla", {}, {"rope_scaling": YARN | {"mscale_all_dim": 0.7}}),
    "deepseek linear": ("mla", {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "deepseek groups": ("mla", GROUPS, {}),
    "deepseek groups, replayed": ("mla", GROUPS, {}),
    "mimo yarn": ("mtp", {}, {"rope_scaling": YARN}),
}

# of tests/twins.py
TWINS = (
    "qwen2",
    "llama",
    "mistral",
    "qwen2_moe",
    "mixtral",
    "glm4_moe",
    "glm4_moe_qk_norm",
    "deepseek_v3",
)
REPLAYED = ("qwen2_moe", "mixtral", "glm4_moe", "gpt_oss")
CASES |= {f"twin {name}": ("twin", {}, {}) for name in TWINS} | {f"twin {name}, replayed": ("twin", {}, {}) for name in REPLAYED}
CASES |= {"twin gpt_oss": ("twin", {}, {"sliding_window": 4})}


def write(folder: Path, model: str, numbers: dict[str, Any], changes: dict[str, Any]) -> None:
    """A checkpoint of random weights, biases and router biases that are not zero."""
    if model == "twin":
        twins.twin(folder, folder.name.removeprefix("twin ").removesuffix(", replayed"), **changes)
        return
    values = {**MODELS[model], **numbers}
    torch.manual_seed(0)
    write_source(folder, ModelConfig(**values), shards=1)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("bias"):
            weights[name] = torch.randn_like(tensor.float()).mul(0.1).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config_json = json.loads(path.read_text())
    if "rope_scaling" in changes:
        del config_json["rope_parameters"]
        config_json["rope_theta"] = values["rope_theta"]
    path.write_text(json.dumps(config_json | changes))


def _config(case: str, make: Any, folder: Path) -> Config:
    model, numbers, changes = CASES[case]
    values = {**MODELS[model], **numbers} if model != "twin" else vars(twins.model_of(folder / case))
    values = values | {"hf_checkpoint": str(folder / case)}
    cfg: Config = make(values, **FP32, **{"router_replay.trainer": "replayed" in case})
    return cfg


def _megatron(values: dict[str, Any], **changes: Any) -> Config:
    MODELS["case"] = values
    return megatron_config("case", "single", **changes)


def compute(folder: Path) -> None:
    """What one rank computes of every case, into `folder`; the only thing that a process of its own does, once for all."""
    from megatron.core import parallel_state

    from runner.trainer.megatron import worker

    for case in CASES:
        cfg = _config(case, _megatron, folder)
        if not parallel_state.is_initialized():
            worker.initialize(cfg, 0, f"file://{folder}/rendezvous")
        rank = worker.Worker(cfg)
        divide, made = Division(cfg).divide, batch(cfg)
        (share,), (mine,) = divide([len(sample.tokens) for sample in made.samples]), steps(cfg, made, divide)
        before = rank.logprobs(made, share, "quantized", "replayed")
        result = rank.updates(mine)
        torch.save((before, {key: result.metrics[key] for key in ("train/loss", "train/grad_norm")}), folder / f"{case}.pt")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for case, (model, numbers, changes) in CASES.items():
        write(folder / case, model, numbers, changes)
    code = "import sys, pathlib, tests.megatron_trainer.test_families as t; t.compute(pathlib.Path(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=500, cwd=ROOT, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_rank_computes_what_the_torch_trainer_computes(case: str, computed: Path) -> None:
    """fp32: sums in another order."""
    before, metrics = torch.load(computed / f"{case}.pt")
    cfg = _config(case, config, computed)
    trainer = TorchTrainer(cfg)
    theirs = torch.cat(trainer.logprobs(batch(cfg)))
    assert (torch.cat([before[index] for index in sorted(before)]) - theirs).abs().max() < 3e-6
    result = trainer.step(batch(cfg)).metrics
    # torch's norm of all gradients at once adds 100,000s of squares in fp32: 4e-5 too little where experts are many
    tolerance = 1e-4 if case.startswith("twin") else 2e-5
    for name, value in metrics.items():
        assert abs(value - result[name]) <= tolerance * max(abs(result[name]), 1e-2), name
    if CASES[case][2]:  # the scaling matters at these lengths: the comparison could fail
        path = computed / case / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": None}))
        plain = torch.cat(TorchTrainer(cfg).logprobs(batch(cfg)))
        assert (plain - theirs).abs().max() > 1e-4
