"""From the config to the arguments of Megatron's own config objects; one function per object, torch-free.

Values are what Megatron's dataclasses take, with dtypes as names ("bfloat16"); `model.py` turns them into objects. The two
places where a CPU differs from a GPU are `_kernels` here and the layer spec in `specs.py`; everything else is one path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from runner.config.choices import BaseDtype, Recompute, RouterScore
from runner.config.schema import Config, ModelConfig
from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.models.agreement import Rope
from runner.models.family import Family
from runner.trainer.megatron.config import MegatronTrainerConfig

Arguments = dict[str, Any]
SWIGLU_ALPHA = 1.702
SCORE_FUNCTIONS = {RouterScore.softmax: "softmax", RouterScore.sigmoid: "sigmoid", RouterScore.top_k_softmax: "softmax"}
FULL_ROUTER_DTYPE = "fp32"  # routers are computed in fp32: near ties of bf16 logits would route at random


@dataclass(frozen=True)
class Device:
    """Where ranks compute. `cuda` False is a CPU rank: local layer specs, gloo, no fused kernels."""

    cuda: bool

    @staticmethod
    def of(cfg: Config) -> Device:
        return Device(cuda=cfg.parallelism.gpus > 0)

    @property
    def backend(self) -> str:
        return "nccl" if self.cuda else "gloo"


def trainer_config(cfg: Config) -> MegatronTrainerConfig:
    return cast(MegatronTrainerConfig, cfg.trainer)


def world_size(cfg: Config) -> int:
    """Ranks of the trainer; UserError when the parallel sizes do not divide them."""
    par = cfg.parallelism
    dense, expert = par.tp * par.pp * par.cp, par.ep * par.etp * par.pp
    for size, shown in (
        (dense, f"tp {par.tp} x pp {par.pp} x cp {par.cp}"),
        (expert, f"ep {par.ep} x etp {par.etp} x pp {par.pp}"),
    ):
        if par.ranks % size:
            raise UserError(
                f"{shown} = {size} does not divide {par.ranks} trainer processes",
                key="parallelism.ranks",
                fix=f"parallelism.ranks={math.ceil(par.ranks / size) * size}",
            )
    return par.ranks


def parallel_state(cfg: Config) -> Arguments:
    """Arguments of megatron.core.parallel_state.initialize_model_parallel."""
    par = cfg.parallelism
    return {
        "tensor_model_parallel_size": par.tp,
        "pipeline_model_parallel_size": par.pp,
        "context_parallel_size": par.cp,
        "expert_model_parallel_size": par.ep,
        "expert_tensor_parallel_size": par.etp,
    }


def environment(cfg: Config) -> dict[str, str]:
    """Environment variables of every rank, set by the runner before torch is imported."""
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # Megatron's overlap of communication relies on one queue
    if not Device.of(cfg).cuda:
        threads = str(trainer_config(cfg).threads or 1)
        variables |= {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        variables["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser compiles every small function, minutes on a CPU
    if cfg.precision.train.format == "fp8":
        variables["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # fp32 scales (amax / 448), as engines have on Hopper
    return variables


def transformer(cfg: Config) -> Arguments:
    """Arguments of TransformerConfig, or of MLATransformerConfig when the model has latent attention (kv_lora_rank > 0)."""
    model, par = cfg.model, cfg.parallelism
    arguments: Arguments = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm or bool(model.kv_lora_rank),
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": cfg.precision.base_dtype.value,
        "pipeline_dtype": cfg.precision.base_dtype.value,
        "bf16": cfg.precision.base_dtype == BaseDtype.bfloat16,
        "tensor_model_parallel_size": par.tp,
        "pipeline_model_parallel_size": par.pp,
        "context_parallel_size": par.cp,
        "expert_model_parallel_size": par.ep,
        "expert_tensor_parallel_size": par.etp,
        "sequence_parallel": par.sequence_parallel,
        "variable_seq_lengths": True,  # packed micro-batches differ in length between pipeline stages' turns
        "moe_token_dispatcher_type": trainer_config(cfg).moe_token_dispatcher.value,  # must suit the line above, dense or not
        # losses are sums divided by the step's token count, so gradients are summed over data-parallel ranks; it must be
        # set before DDP is built: otherwise DDP averages without an error
        "calculate_per_token_loss": True,
        **_kernels(cfg),
        **_recompute(cfg),
    }
    if par.last_stage_layers is not None and par.pp > 1:
        arguments["num_layers_in_last_pipeline_stage"] = par.last_stage_layers
    if model.num_experts:
        arguments |= _experts(cfg)
    if model.kv_lora_rank:
        arguments |= _latent_attention(model)
    if cfg.precision.train.format == "fp8" and Device.of(cfg).cuda:
        arguments |= _fp8(cfg)
    return arguments


def _kernels(cfg: Config) -> Arguments:
    """What depends on the device: fused kernels exist on CUDA only."""
    cuda = Device.of(cfg).cuda
    return {
        "use_cpu_initialization": not cuda,
        "perform_initialization": True,  # every weight is loaded, but this is where Megatron marks the divided ones
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "apply_rope_fusion": cuda and not cfg.model.kv_lora_rank,
        "masked_softmax_fusion": cuda,
        "persist_layer_norm": cuda,
        "gradient_accumulation_fusion": cuda and trainer_config(cfg).gradient_accumulation_fusion,
        "cross_entropy_loss_fusion": False,  # logprobs are computed in chunks by scores.py
    }


def _recompute(cfg: Config) -> Arguments:
    match trainer_config(cfg).recompute:
        case Recompute.none:
            return {}
        case Recompute.full:
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case Recompute.selective:
            modules = ["moe"] if cfg.model.num_experts else ["mlp"]
            if cfg.model.num_experts and cfg.model.num_dense_layers:
                modules.append("mlp")
            return {"recompute_granularity": "selective", "recompute_modules": modules}


def _experts(cfg: Config) -> Arguments:
    model, trainer = cfg.model, trainer_config(cfg)
    cuda = Device.of(cfg).cuda
    arguments: Arguments = {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.experts_top_k,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * (model.num_layers - model.num_dense_layers),
        "moe_grouped_gemm": cuda,
        "moe_permute_fusion": cuda and trainer.permute_fusion,
        "moe_router_fusion": cuda and trainer.router_fusion,
        "moe_router_dtype": FULL_ROUTER_DTYPE,
        "moe_router_score_function": SCORE_FUNCTIONS[model.router_score],
        # the softmax over the chosen logits is the renormalised softmax over all; before the choice it stays as it is
        "moe_router_pre_softmax": not family_of(model).normalizes_top_k,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": cfg.router_replay.trainer,
    }
    if model.router_bias:
        arguments |= {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0}
    if model.routed_scaling_factor != 1.0:
        arguments["moe_router_topk_scaling_factor"] = model.routed_scaling_factor
    if model.expert_groups_top_k < model.expert_groups:
        arguments |= {"moe_router_num_groups": model.expert_groups, "moe_router_group_topk": model.expert_groups_top_k}
    if model.num_shared_experts:
        arguments["moe_shared_expert_intermediate_size"] = model.num_shared_experts * model.expert_ffn_size
        if family_of(model).gates_shared_expert:
            arguments["moe_shared_expert_gate"] = True
    return arguments


def _latent_attention(model: ModelConfig) -> Arguments:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": "rope",
        "rotary_base": model.rope_theta,
        "rotary_percent": 1.0,
    }


def _fp8(cfg: Config) -> Arguments:
    """Transformer Engine's blockwise FP8, the layout engines serve; scales are fp32 by `environment`."""
    return {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": cfg.precision.fp8_param_gather,
        "fp8_wgrad": cfg.precision.fp8_backward,
    }


def rope_scaling(hf_config: dict[str, Any]) -> Arguments:
    """MLA's arguments from the rotary scaling of a checkpoint's config.json (Kimi-K2, DeepSeek-V3); {} for plain rope.

    Megatron's name for any scaling is YaRN. What rotates is runner/trainer/megatron/rope.py; what is left to Megatron is the
    scale of the attention's logits, from `factor` and `mscale_all_dim`.
    """
    rope = Rope.of(hf_config)
    if rope.kind == "default":
        return {}
    values, longest = rope.values, float(hf_config.get("max_position_embeddings", 0))
    original = values.get("original_max_position_embeddings") or longest
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(values.get("factor") or longest / original),
        "original_max_position_embeddings": int(original),
        "mscale_all_dim": float(values.get("mscale_all_dim") or 0.0),
    }


def gpt_oss(model: ModelConfig, hf_config: dict[str, Any]) -> Arguments:
    """What gpt-oss's config.json says beside the model group: biases everywhere, sinks, a clamped SwiGLU, windows; {} for other
    families. UserError for another gain than that of the activation that Megatron has.

    The window counts the token itself in transformers, and those before it in Megatron.
    """
    if model.family != "gpt_oss":
        return {}
    if (alpha := hf_config.get("swiglu_alpha", SWIGLU_ALPHA)) != SWIGLU_ALPHA:
        raise UserError(
            f"Megatron's SwiGLU of gpt-oss has a gain of {SWIGLU_ALPHA}, not {alpha}", key="trainer", fix="trainer=torch"
        )
    arguments: Arguments = {
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": float(hf_config.get("swiglu_limit", 7.0)),
    }
    kinds = hf_config.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(model.num_layers)]
    window = family_of(model).window(hf_config)
    if window is not None:
        arguments["window_size"] = (window - 1, 0)
        arguments["window_attn_skip_freq"] = [int(kind == "sliding_attention") for kind in kinds]
    return arguments


def gpt_model(cfg: Config) -> Arguments:
    """Arguments of GPTModel that depend on the config alone."""
    model = cfg.model
    share = family_of(model).rotary_share
    return {
        "vocab_size": padded_vocabulary(cfg),
        "max_sequence_length": model.max_context_tokens,
        "position_embedding_type": "rope",
        "rotary_base": model.rope_theta,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "parallel_output": True,
    } | ({"rotary_percent": share} if share < 1 else {})


def padded_vocabulary(cfg: Config) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of tp. Padding rows never get probability."""
    return math.ceil(cfg.model.vocab_size / cfg.parallelism.tp) * cfg.parallelism.tp


def distributed_data_parallel(cfg: Config) -> Arguments:
    """Arguments of DistributedDataParallelConfig."""
    trainer = trainer_config(cfg)
    return {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": trainer.distributed_optimizer,
        "overlap_grad_reduce": trainer.overlap_grad_reduce,
        "overlap_param_gather": trainer.overlap_param_gather and trainer.distributed_optimizer,
        "bucket_size": trainer.grad_bucket_elements,
        "average_in_collective": False,
        "fp8_param_gather": cfg.precision.fp8_param_gather,
    }


def optimizer(cfg: Config) -> Arguments:
    """Arguments of OptimizerConfig. The rate itself is set before every step (runner.trainer.optimizer.learning_rate)."""
    trainer = trainer_config(cfg)
    options = trainer.optimizer
    offload = options.cpu_offload and Device.of(cfg).cuda
    arguments: Arguments = {
        "optimizer": "adam",
        "lr": options.lr,
        "min_lr": options.lr,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.beta1,
        "adam_beta2": options.beta2,
        "adam_eps": options.eps,
        "clip_grad": options.clip_grad_norm,
        "bf16": cfg.precision.base_dtype == BaseDtype.bfloat16,
        "params_dtype": cfg.precision.base_dtype.value,
        "use_distributed_optimizer": trainer.distributed_optimizer,
        "overlap_param_gather": trainer.overlap_param_gather and trainer.distributed_optimizer,
        # Megatron's hybrid optimizer, which keeps masters and moments in host memory, is a precision-aware one
        "use_precision_aware_optimizer": trainer.precision_aware_optimizer or offload,
        # half of the master would live in the bf16 model weight, which QAT overwrites
        "store_param_remainders": False,
        "optimizer_cpu_offload": offload,
    }
    if offload:
        arguments |= {
            "optimizer_offload_fraction": 1.0,
            "use_torch_optimizer_for_cpu_offload": True,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    elif trainer.precision_aware_optimizer:
        arguments |= {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "main_grads_dtype": "float32"}
    return arguments


def everything(cfg: Config) -> Arguments:
    """All arguments of one run, as the golden files of the tests hold them."""
    return {
        "world_size": world_size(cfg),
        "backend": Device.of(cfg).backend,
        "environment": environment(cfg),
        "parallel_state": parallel_state(cfg),
        "transformer": transformer(cfg),
        "gpt_model": gpt_model(cfg),
        "distributed_data_parallel": distributed_data_parallel(cfg),
        "optimizer": optimizer(cfg),
    }


def check(cfg: Config) -> Family:
    """The model's family. UserError for what this trainer cannot do, before a process is started."""
    from runner.trainer.megatron.rules import RULES

    world_size(cfg)
    if problems := [problem for rule in RULES for problem in rule(cfg)]:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    everything(cfg)
    return family_of(cfg.model)
