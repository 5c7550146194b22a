"""Configs of the Megatron tests: the torch trainer's tiny ones with another trainer and layout, from the same seed."""

from __future__ import annotations

from runner import schema
from runner.schema import Config
from runner.trainer.megatron.config import MegatronTrainerConfig
from tests.trainer_configs import DENSE, MLA, MOE, config

LAYOUTS: dict[str, dict[str, object]] = {
    "single": {},
    "tp2": {"tp": 2, "sequence_parallel": False},
    "tp2_sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2, "last_stage_layers": 1},
    "cp2": {"cp": 2},
    "dp2": {},
    "ep2": {"ep": 2},
    "etp2": {"tp": 2, "sequence_parallel": True, "etp": 2},
    "mix4": {"tp": 2, "sequence_parallel": True, "pp": 2, "last_stage_layers": 1, "ep": 2},
}
RANKS = {"single": 1, "mix4": 4}

WIDE: dict[str, object] = {"hidden_size": 64, "num_heads": 4, "expert_ffn_size": 64}
MODELS: dict[str, dict[str, object]] = {
    "moe": {**MOE, **WIDE, "num_layers": 3, "num_kv_heads": 2, "tied_embeddings": False},
    "dense": {
        **DENSE, **WIDE, "num_layers": 3, "num_kv_heads": 2, "num_dense_layers": 3, "expert_ffn_size": 0,
        "vocab_size": 273,  # padded to 274 with tp 2
    },
    "mla": {**MLA, **WIDE, "num_kv_heads": 4, "kv_lora_rank": 32},
    "mla_q": {**MLA, **WIDE, "num_kv_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32},
    "mtp": {
        **DENSE, **WIDE, "name": "tiny_mtp", "family": "mimo", "num_kv_heads": 2, "qk_norm": False, "attention_bias": True,
        "num_mtp_layers": 1, "tied_embeddings": False, "expert_ffn_size": 0,
    },
}  # fmt: skip


def parallelism(layout: str, **changes: object) -> schema.ParallelismConfig:
    values: dict[str, object] = {
        "name": f"cpu_{layout}", "gpus": 0, "ranks": RANKS.get(layout, 2), "tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1,
        "sequence_parallel": False, "last_stage_layers": None, "gpus_per_engine": 0, "engine_ep": 1, "rollout_gpus": 0,
        "colocate": True,
    }  # fmt: skip
    return schema.ParallelismConfig(**values | LAYOUTS[layout] | changes)  # type: ignore[arg-type]


def megatron_config(model: str = "moe", layout: str = "single", **changes: object) -> Config:
    """`changes` as in trainer_configs.config; keys under `parallelism.` and `trainer.` too."""
    layout_changes = {
        key.removeprefix("parallelism."): changes.pop(key) for key in list(changes) if key.startswith("parallelism.")
    }
    cfg = config(MODELS[model], **{key: value for key, value in changes.items() if not key.startswith("trainer.")})
    torch_trainer = cfg.trainer
    cfg.trainer = MegatronTrainerConfig(
        _target_="runner.trainer.megatron.MegatronTrainer", name="megatron", optimizer=torch_trainer.optimizer,
        max_tokens_per_gpu=torch_trainer.max_tokens_per_gpu, recompute="none", max_nan_steps=3, logprob_chunk_tokens=4096,
        threads=1, distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True,
        gradient_accumulation_fusion=True, precision_aware_optimizer=False, router_fusion=False,
        moe_token_dispatcher="alltoall", resident_reference=False, grad_bucket_elements=None, rank_timeout_seconds=240.0,
        initial_checkpoint=None, async_save=False, max_restarts=0,
    )  # fmt: skip
    cfg.parallelism = parallelism(layout, **layout_changes)
    for key, value in changes.items():
        if key.startswith("trainer."):
            target: object = cfg
            *path, last = key.split(".")
            for part in path:
                target = getattr(target, part)
            setattr(target, last, value)
    return cfg
