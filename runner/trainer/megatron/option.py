"""trainer=megatron: megatron-core, one process per rank. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version

from runner.config.option import Need, Option, TrainerLayout
from runner.config.packages import version_of
from runner.config.schema import Config
from runner.errors import UserError
from runner.trainer.megatron.arguments import padded_vocabulary, trainer_config
from runner.trainer.megatron.config import MegatronTrainerConfig
from runner.trainer.megatron.rules import RULES


def layout(cfg: Config) -> TrainerLayout:
    trainer = trainer_config(cfg)
    return TrainerLayout(
        in_process=False,
        fused=True,
        masters=True,
        shards_states=trainer.distributed_optimizer,
        padded_vocabulary=padded_vocabulary(cfg),
        resident_reference=trainer.resident_reference,
        keeps_quantized=not cfg.precision.fp8_param_gather,
        max_restarts=trainer.max_restarts,
    )


def permutation(cfg: Config) -> Iterator[UserError]:
    """Transformer Engine 2.9's kernel calls a function that Triton 3.5 no longer lets it call (seen: 2.9.0 with Triton 3.6)."""
    engine, triton = (Version(version_of(name) or "0") for name in ("transformer-engine", "triton"))
    if trainer_config(cfg).permute_fusion and cfg.parallelism.gpus and engine < Version("2.10") and triton >= Version("3.5"):
        problem = f"the fused permutation of Transformer Engine {engine} does not compile with Triton {triton}"
        yield UserError(problem, key="trainer.permute_fusion", fix="trainer.permute_fusion=false, or make setup-gpu")


OPTION = Option(
    MegatronTrainerConfig,
    rules=RULES,
    machine=(permutation,),
    needs=(
        Need(
            "megatron-core",
            "megatron.core",
            "Megatron's trainer ranks need megatron-core, which is not installed",
            "make setup",
        ),
        Need(
            "transformer-engine",
            "transformer_engine",
            "Megatron's layers on GPUs are Transformer Engine's, which is not installed",
            "make setup-gpu",
            when=lambda cfg: cfg.parallelism.gpus > 0,
            loads="transformer_engine.pytorch",
        ),
    ),
    trainer=layout,
)
