"""Configs of the Megatron tests: the torch trainer's tiny ones with another trainer and layout, from the same seed."""

from __future__ import annotations

from runner.config.schema import Config
from tests.trainer_configs import DENSE, MLA, MOE, config, model

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

WIDE: dict[str, object] = {"hidden_size": 64, "num_heads": 4}
MODELS: dict[str, dict[str, object]] = {
    "moe": {**MOE, **WIDE, "num_layers": 3, "num_kv_heads": 2, "expert_ffn_size": 64, "tied_embeddings": False},
    "dense": {
        **DENSE,
        **WIDE,
        "num_layers": 3,
        "num_kv_heads": 2,
        "vocab_size": 273,  # padded to 274 with tp 2
    },
    "mla": {**MLA, **WIDE, "num_kv_heads": 4, "expert_ffn_size": 64, "kv_lora_rank": 32},
    "mla_q": {**MLA, **WIDE, "num_kv_heads": 4, "expert_ffn_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32},
    "gpt_oss": model(
        "tiny_gpt_oss", **WIDE, num_layers=3, num_kv_heads=2, num_experts=4, expert_ffn_size=64, tied_embeddings=False
    ),
    "mtp": model("tiny_mtp", **WIDE, num_kv_heads=2, tied_embeddings=False),
}


def megatron_config(model: str = "moe", layout: str = "single", **changes: object) -> Config:
    """`changes` as in trainer_configs.config."""
    cut = {f"parallelism.{key}": value for key, value in LAYOUTS[layout].items()}
    limits = {"parallelism.ranks": RANKS.get(layout, 2), "trainer.rank_timeout_seconds": 240.0, "trainer.max_restarts": 0}
    return config(MODELS[model], "megatron", **{"parallelism.name": f"cpu_{layout}", **limits, **cut, **changes})
