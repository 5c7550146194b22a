"""trainer=megatron: megatron-core, one process per rank. Torch-free."""

from __future__ import annotations

from runner.config.option import Need, Option, TrainerLayout
from runner.config.schema import Config
from runner.trainer.megatron.arguments import trainer_config
from runner.trainer.megatron.config import MegatronTrainerConfig
from runner.trainer.megatron.rules import RULES


def layout(cfg: Config) -> TrainerLayout:
    trainer = trainer_config(cfg)
    return TrainerLayout(
        in_process=False,
        fused=True,
        masters=True,
        shards_states=trainer.distributed_optimizer,
        pads_vocabulary=True,
        resident_reference=trainer.resident_reference,
        keeps_fp8=not cfg.precision.fp8_param_gather,
        max_restarts=trainer.max_restarts,
    )


OPTION = Option(
    MegatronTrainerConfig,
    rules=RULES,
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
