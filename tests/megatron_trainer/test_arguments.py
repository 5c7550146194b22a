"""The one function from config to Megatron's arguments: golden files for every recipe, and the arguments that matter by name.

Torch-free and GPU-free: this file runs in `make test`. Golden files: tests/goldens.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config import compose
from runner.config.schema import Config
from runner.errors import UserError
from runner.trainer.megatron import arguments
from tests import goldens
from tests.megatron_trainer.configs import megatron_config

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def _load(*overrides: str) -> Config:
    return compose.load(list(overrides), check_rules=False).config


def _megatron_recipes() -> list[str]:
    return [name for name in RECIPES if not name.startswith("laptop") and name != "none"]


@pytest.mark.parametrize("recipe", _megatron_recipes())
def test_golden_arguments_of_every_recipe(recipe: str) -> None:
    cfg = _load(f"recipe={recipe}")
    if cfg.trainer.name != "megatron":
        assert not (GOLDEN / f"{recipe}.yaml").exists()
        pytest.skip(f"trainer={cfg.trainer.name}")
    found = json.loads(json.dumps(arguments.everything(cfg)))  # lists instead of tuples
    goldens.check(GOLDEN / f"{recipe}.yaml", found, _megatron_recipes()[0])


def test_arguments_import_neither_torch_nor_megatron() -> None:
    program = (
        "import sys\nfrom runner.config import compose\nfrom runner.trainer.megatron import arguments\n"
        "arguments.everything(compose.load(['recipe=kimi_k2_int4'], check_rules=False).config)\n"
        "print([name for name in ('torch', 'megatron', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_qat_keeps_masters_out_of_the_model_weights() -> None:
    """Half of a master's bits in the bf16 weight would be destroyed by quantizing it."""
    for changes in ({}, {"trainer.precision_aware_optimizer": True}, {"trainer.optimizer.cpu_offload": True}):
        cfg = megatron_config("moe", "dp2", format="int4", **changes)
        assert arguments.optimizer(cfg)["store_param_remainders"] is False


def test_precision_aware_and_offloaded_optimizers() -> None:
    cfg = _load("recipe=qwen3_30b_int4", "trainer.optimizer.cpu_offload=true")
    values = arguments.optimizer(cfg)
    assert values["optimizer_cpu_offload"] and values["optimizer_offload_fraction"] == 1.0
    assert values["use_precision_aware_optimizer"]  # Megatron's hybrid optimizer is one
    cfg = _load("recipe=qwen3_30b_int4", "trainer.precision_aware_optimizer=true", "trainer.optimizer.cpu_offload=false")
    values = arguments.optimizer(cfg)
    assert values["exp_avg_dtype"] == "bfloat16" and not values["optimizer_cpu_offload"]


def test_fp8_is_blockwise_with_fp32_scales() -> None:
    cfg = _load("recipe=qwen3_30b_fp8")
    values = arguments.transformer(cfg)
    assert values["fp8"] == "e4m3" and values["fp8_recipe"] == "blockwise"
    assert arguments.environment(cfg)["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "1"


def test_a_cpu_rank_has_no_fused_kernel() -> None:
    values = arguments.transformer(megatron_config("moe", "tp2_sp"))
    fused = [key for key, value in values.items() if "fusion" in key and value]
    assert fused == [] and values["moe_grouped_gemm"] is False


def test_router_fusion_excludes_replay() -> None:
    cfg = megatron_config("moe", **{"router_replay.trainer": True, "trainer.router_fusion": True})
    with pytest.raises(UserError, match="ignores replayed routes"):
        arguments.check(cfg)


def test_rope_scaling_of_kimi() -> None:
    scaling = {
        "type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    assert arguments.rope_scaling({"rope_scaling": scaling})["rotary_scaling_factor"] == 64.0
    assert arguments.rope_scaling({"rope_scaling": scaling})["mscale_all_dim"] == 1.0
    assert arguments.rope_scaling({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}) == {}
    short = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768}  # a Qwen3 card's
    assert arguments.rope_scaling(short)["original_max_position_embeddings"] == 32768


@pytest.mark.megatron
@pytest.mark.parametrize("recipe", _megatron_recipes())
def test_every_argument_exists_in_megatron(recipe: str) -> None:
    from dataclasses import fields

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    cfg = _load(f"recipe={recipe}")
    if cfg.trainer.name != "megatron":
        pytest.skip(f"trainer={cfg.trainer.name}")
    transformer = MLATransformerConfig if cfg.model.kv_lora_rank else TransformerConfig
    for kind, given in (
        (transformer, arguments.transformer(cfg)),
        (DistributedDataParallelConfig, arguments.distributed_data_parallel(cfg)),
        (OptimizerConfig, arguments.optimizer(cfg)),
    ):
        assert given.keys() <= {field.name for field in fields(kind)}, kind
