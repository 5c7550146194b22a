"""Rules of trainer=megatron: what Megatron would do wrong without a word, or refuse in the middle of a launch. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.errors import UserError
from runner.schema import Config, MegatronTrainerConfig, QatPlacement


def router(cfg: Config) -> Iterator[UserError]:
    trainer = cfg.trainer
    if not isinstance(trainer, MegatronTrainerConfig):
        return
    if trainer.router_fusion and cfg.router_replay.trainer:
        yield UserError(
            "the fused router ignores replayed routes without a word",
            key="trainer.router_fusion",
            fix="trainer.router_fusion=false, or router_replay=none",
        )
    if trainer.moe_token_dispatcher == "allgather":
        yield UserError(
            "Megatron's allgather dispatcher does not take packed micro-batches, whose length varies",
            key="trainer.moe_token_dispatcher",
            fix="trainer.moe_token_dispatcher=alltoall",
        )


def optimizer(cfg: Config) -> Iterator[UserError]:
    trainer = cfg.trainer
    if not isinstance(trainer, MegatronTrainerConfig):
        return
    for option in ("overlap_param_gather", "precision_aware_optimizer"):
        if getattr(trainer, option) and not trainer.distributed_optimizer:
            yield UserError(
                f"{option} is an option of the distributed optimizer",
                key=f"trainer.{option}",
                fix=f"trainer.{option}=false or trainer.distributed_optimizer=true",
            )
    if trainer.precision_aware_optimizer and not cfg.parallelism.gpus:
        yield UserError(
            "the precision-aware optimizer is Transformer Engine's, which needs CUDA",
            key="trainer.precision_aware_optimizer",
            fix="trainer.precision_aware_optimizer=false",
        )


def quantization(cfg: Config) -> Iterator[UserError]:
    trainer, precision = cfg.trainer, cfg.precision
    if not isinstance(trainer, MegatronTrainerConfig):
        return
    if precision.fp8_param_gather and not cfg.parallelism.gpus:
        yield UserError(
            "gathering parameters in FP8 is Transformer Engine's, which needs CUDA; CPU ranks simulate FP8 in bf16",
            key="precision.fp8_param_gather",
            fix="precision.fp8_param_gather=false",
        )
    forward = precision.train.format != "bf16" and precision.qat_placement is QatPlacement.forward
    if forward and cfg.parallelism.gpus and trainer.gradient_accumulation_fusion:
        yield UserError(
            "a fake-quantized weight has no main_grad for the fused gradient accumulation",
            key="precision.qat_placement",
            fix="precision.qat_placement=in_place, or trainer.gradient_accumulation_fusion=false",
        )


def heads(cfg: Config) -> Iterator[UserError]:
    model, par = cfg.model, cfg.parallelism
    if not isinstance(cfg.trainer, MegatronTrainerConfig):
        return
    if not model.kv_lora_rank and 0 < model.num_kv_heads < par.tp:
        yield UserError(
            f"{model.num_kv_heads} key/value heads on {par.tp} tensor-parallel ranks: Megatron gives each rank at least one",
            key="parallelism.tp",
            fix=f"parallelism.tp={model.num_kv_heads}",
        )
    if model.expert_groups_top_k < model.expert_groups and model.experts_top_k != 2 * model.expert_groups_top_k:
        best = model.experts_top_k // max(1, model.expert_groups_top_k)
        yield UserError(
            f"Megatron ranks groups of experts by the sum of their best {best}, DeepSeek by that of the best 2",
            key="model.expert_groups_top_k",
            fix="trainer=torch",
        )
    if model.kv_lora_rank and model.attention_bias:
        yield UserError(
            "Megatron's latent attention has no biases",
            key="model.attention_bias",
            fix="trainer=torch, or a checkpoint without attention biases",
        )
    if model.vision:
        yield UserError("trainer=megatron has no vision towers", key="model", fix="trainer=torch")


RULES = (router, optimizer, quantization, heads)
