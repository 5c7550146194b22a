"""Rules of trainer=megatron: what Megatron would do wrong without a word, or refuse in the middle of a launch. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.choices import Fp8Matmul, TokenDispatcher
from runner.config.option import Rule
from runner.config.schema import Config, QatPlacement
from runner.errors import UserError
from runner.models import family_of
from runner.models.agreement import Rope, local_config, window_problem
from runner.trainer import adapters
from runner.trainer.megatron.arguments import trainer_config

# families whose mapping was compared with the torch trainer: tests/megatron_trainer/test_families.py
FAMILIES = (
    "deepseek",
    "glm4_moe",
    "gpt_oss",
    "llama",
    "mimo",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
WINDOWS = ("gpt_oss",)  # those of them whose layers with a window are computed
# why others are not among them
NOT_MAPPED = {
    "gemma3": "Megatron-core has no norms behind the attention and the mlp, which Gemma 3 has, and one rotary base",
    "glm4": "Megatron-core has no norms behind the attention and the mlp, which GLM-4 has",
    "glm4_moe_lite": "Megatron-core gives the norms on latents rms_norm_eps, transformers does not: logprobs differ by 4e-5",
    "minimax_m2": "Megatron-core's norms on queries and keys are of each head, MiniMax-M2's span all heads",
    "qwen3_vl": "trainer=megatron has no vision towers",
}


def families(cfg: Config) -> Iterator[UserError]:
    model = cfg.model
    if model.family not in FAMILIES:
        reason = NOT_MAPPED.get(model.family, "what it would compute was compared with nothing")
        key = "model" if model.vision else "model.family"
        yield UserError(f"trainer=megatron does not train {model.family}: {reason}", key=key, fix="trainer=torch")
    elif model.family not in WINDOWS and (error := window_problem(model, family_of(model), local_config(model))):
        yield error
    elif family_of(model).rotary_share < 1 and Rope.of(local_config(model) or {}).kind != "default":
        problem = "a scale of the attention's logits stands for the rotary scaling's factor, and part of a head is not rotated"
        yield UserError(f"{problem} in family {model.family}", key="model.hf_checkpoint", fix="trainer=torch")


def sinks(cfg: Config) -> Iterator[UserError]:
    """gpt-oss: attention with sinks, and experts with biases."""
    if cfg.model.family != "gpt_oss":
        return
    if cfg.parallelism.gpus:
        problem = "what Transformer Engine makes of gpt_oss's sinks, windows and biases was compared with nothing"
        yield UserError(problem, key="model.family", fix="trainer=torch, or CPU ranks")
    elif cfg.parallelism.ranks > 1:
        problem = "gpt_oss, with sinks, has another gradient norm on tensor-parallel ranks than on one; others were not tried"
        yield UserError(problem, key="parallelism", fix="parallelism=single, or trainer=torch")


def router(cfg: Config) -> Iterator[UserError]:
    trainer = trainer_config(cfg)
    if trainer.router_fusion and cfg.router_replay.trainer:
        yield UserError(
            "the fused router ignores replayed routes without a word",
            key="trainer.router_fusion",
            fix="trainer.router_fusion=false, or router_replay=none",
        )
    if trainer.moe_token_dispatcher == TokenDispatcher.allgather:
        yield UserError(
            "Megatron's allgather dispatcher does not take packed micro-batches, whose length varies",
            key="trainer.moe_token_dispatcher",
            fix="trainer.moe_token_dispatcher=alltoall",
        )


def optimizer(cfg: Config) -> Iterator[UserError]:
    trainer = trainer_config(cfg)
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
    trainer, precision = trainer_config(cfg), cfg.precision
    if precision.fp8_param_gather and not cfg.parallelism.gpus:
        yield UserError(
            "gathering parameters in FP8 is Transformer Engine's, which needs CUDA; CPU ranks simulate FP8 in bf16",
            key="precision.fp8_param_gather",
            fix="precision.fp8_param_gather=false",
        )
    if precision.fp8_matmul != Fp8Matmul.simulated:
        yield UserError(
            "trainer=megatron has FP8 matmuls of its own: Transformer Engine's on CUDA, simulated on CPU ranks",
            key="precision.fp8_matmul",
            fix="precision.fp8_matmul=simulated",
        )
    if precision.train.format == "nvfp4":
        yield UserError(
            "NVFP4 has a scale over a whole weight, which Megatron fuses and divides",
            key="precision",
            fix="precision=mxfp4_qat or int4_qat, or trainer=torch",
        )
    forward = precision.train.format != "bf16" and precision.qat_placement is QatPlacement.forward
    if forward and cfg.parallelism.gpus and trainer.gradient_accumulation_fusion:
        yield UserError(
            "a fake-quantized weight has no main_grad for the fused gradient accumulation",
            key="precision.qat_placement",
            fix="precision.qat_placement=in_place, or trainer.gradient_accumulation_fusion=false",
        )


def drafts(cfg: Config) -> Iterator[UserError]:
    if cfg.speculative.online_training and cfg.parallelism.pp > 1:
        yield UserError(
            "MTP layers are trained where the output layer is, and need the embedding, which is on another pipeline stage",
            key="speculative.online_training",
            fix="speculative.online_training=false, or parallelism.pp=1",
        )


def experts(cfg: Config) -> Iterator[UserError]:
    if cfg.model.num_experts and cfg.parallelism.tp > 1 and not cfg.parallelism.sequence_parallel:
        yield UserError(
            f"Megatron's experts need sequence parallelism with tp {cfg.parallelism.tp}",
            key="parallelism.sequence_parallel",
            fix="parallelism.sequence_parallel=true",
        )


def heads(cfg: Config) -> Iterator[UserError]:
    model, par = cfg.model, cfg.parallelism
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


def lora(cfg: Config) -> Iterator[UserError]:
    if adapters.has_adapters(cfg):
        yield from adapters.none("trainer=megatron", "its ranks train whole weights", fix="trainer=torch, or trainer.lora.rank=0")


RULES: tuple[Rule, ...] = (families, sinks, router, optimizer, quantization, drafts, experts, heads, lora)
