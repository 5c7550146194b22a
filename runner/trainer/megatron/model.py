"""Building one rank's part of the model: Megatron's config objects, the GPT model, its weights, DDP and the optimizer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel, gpt_model
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from runner.config.schema import Config
from runner.errors import UserError
from runner.models import family_of
from runner.models.family import Family
from runner.trainer.megatron import arguments, names, rope
from runner.trainer.megatron.sources import Read
from runner.trainer.megatron.specs import decoder_spec

FUSION = "fused_weight_gradient_mlp_cuda"  # APEX's extension
ACTIVATIONS = {"silu": torch.nn.functional.silu, "quick_gelu": quick_gelu}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class PolicyModel(GPTModel):
    """A GPT whose last stage returns hidden states [S, 1, H] behind the last norm: scores.py computes logprobs from them in
    chunks, so that logits of all tokens never exist."""

    padding_idx: int | None = None

    def _preprocess(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The padding token's embedding gets no gradient, as in transformers (`nn.Embedding(padding_idx=...)`).

        Its row starts at zero, where RMSNorm's Jacobian is 1 / sqrt(eps): one sampled padding token would give a gradient
        of thousands, and clipping would then undo the whole step.
        """
        embedded, *rest = super()._preprocess(input_ids, *args, **kwargs)
        if embedded is not None and self.padding_idx is not None:
            padding = (input_ids == self.padding_idx).transpose(0, 1).unsqueeze(-1)
            if self.config.sequence_parallel:
                group = parallel_state.get_tensor_model_parallel_group()
                padding = padding.chunk(group.size())[group.rank()]
            embedded = torch.where(padding, embedded.detach(), embedded)
        return embedded, *rest

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@dataclass(frozen=True)
class Place:
    """One local parameter (or saved buffer) and what it is in the HF checkpoint.

    dim     its tensor-parallel dimension; None when every rank holds it whole
    """

    name: str  # global Megatron name
    tensor: torch.Tensor
    entry: names.Mapped
    dim: int | None

    @property
    def parameter(self) -> bool:
        return isinstance(self.tensor, torch.nn.Parameter)

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """Ranks that hold the other shards."""
        if self.entry.expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def leader(self) -> bool:
        """Whether this rank's group of shards is the first of its data-parallel copies."""
        if self.entry.expert:
            return parallel_state.get_expert_data_parallel_rank() == 0
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def transformer_config(cfg: Config, hf_config: dict[str, Any]) -> TransformerConfig:
    values = arguments.transformer(cfg)
    for key in ("params_dtype", "pipeline_dtype"):
        values[key] = DTYPES[values[key]]
    values |= rope.scaling_arguments(cfg.model, hf_config) | arguments.gpt_oss(cfg.model, hf_config)
    values["activation_func"] = ACTIVATIONS[values["activation_func"]]
    kind = MLATransformerConfig if cfg.model.kv_lora_rank else TransformerConfig
    return kind(**values)


def build_gpt(cfg: Config, config: TransformerConfig, hf_config: dict[str, Any]) -> GPTModel:
    """This pipeline stage's layers, on the rank's device in the base dtype, weights not yet loaded."""
    RouterReplay.clear_global_router_replay_instances()  # Megatron keeps them in a class-wide list
    with plain_output_layer():
        model = PolicyModel(
            config=config,
            transformer_layer_spec=decoder_spec(
                config, cuda=arguments.Device.of(cfg).cuda, output_bias=names.output_bias(cfg.model, family_of(cfg.model))
            ),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **arguments.gpt_model(cfg),
        )
    model.padding_idx = hf_config.get("pad_token_id")
    rope.install(model, cfg.model)
    if arguments.Device.of(cfg).cuda:
        model.cuda(torch.cuda.current_device())
    _own_expert_replicas(model)
    return model


@contextlib.contextmanager
def plain_output_layer() -> Iterator[None]:
    """Megatron's own column-parallel layers, of which a GPT on CUDA has one, its output layer, do not fuse the accumulation of
    their gradient where APEX's extension is missing: they raise otherwise. Transformer Engine's layers fuse by themselves.
    """
    real = gpt_model.tensor_parallel.ColumnParallelLinear

    def build(*args: Any, config: TransformerConfig, **kwargs: Any) -> Any:
        own = copy.copy(config)
        own.gradient_accumulation_fusion = own.gradient_accumulation_fusion and find_spec(FUSION) is not None
        return real(*args, config=own, **kwargs)

    gpt_model.tensor_parallel.ColumnParallelLinear = build
    try:
        yield
    finally:
        gpt_model.tensor_parallel.ColumnParallelLinear = real


def _own_expert_replicas(model: GPTModel) -> None:
    """With tp > 1 and neither expert nor expert-tensor parallelism every tp rank holds all experts but sees its own tokens.

    Megatron then reduces their gradients over data-parallel ranks only, and the replicas drift apart. Marked as expert
    parameters, they are reduced over expert-data-parallel ranks, which are exactly the replicas.
    """
    replicas = parallel_state.get_expert_data_parallel_world_size()
    if replicas == parallel_state.get_data_parallel_world_size(with_context_parallel=True):
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def places(cfg: Config, family: Family, model: GPTModel) -> list[Place]:
    """Every local parameter and router bias with its HF tensors; a parameter without an entry is an error."""
    table = names.table(cfg.model, family)
    first_layer = get_transformer_layer_offset(model.config)
    experts = cfg.model.num_experts // max(parallel_state.get_expert_model_parallel_world_size(), 1)
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts if cfg.model.num_experts else 0
    found = []
    for name, tensor in _named(model):
        if name == "output_layer.weight" and cfg.model.tied_embeddings:
            continue  # the last stage's copy of the embedding
        global_name = names.canonical(name, first_layer, first_expert)
        if global_name not in table:
            raise UserError(f"Megatron's parameter {name} has no place in family {family.name}", key="model.family")
        dim: int | None = getattr(tensor, "partition_dim", None) if getattr(tensor, "tensor_model_parallel", False) else None
        found.append(Place(global_name, tensor, table[global_name], dim))
    return found


def _named(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".expert_bias"))


@torch.no_grad()
def load_weights(cfg: Config, model: GPTModel, where: list[Place], read: Read) -> None:
    """Fill every local parameter from HF weights; the last stage's copy of a tied embedding too."""
    for place in where:
        _load(cfg, place.tensor, place, read)
    if cfg.model.tied_embeddings and model.post_process and not model.pre_process:
        entry = names.Mapped("output_layer.weight", names.Kind.direct, ("model.embed_tokens.weight",), vocabulary=True)
        _load(cfg, model.output_layer.weight, Place(entry.name, model.output_layer.weight, entry, 0), read)


def _load(cfg: Config, target: torch.Tensor, place: Place, read: Read) -> None:
    tensors = [read(name) for name in place.entry.hf]
    group = place.group
    shard = names.to_shard(place.entry, tensors, cfg.model, place.dim, group.rank(), group.size())
    if shard.shape != target.shape:
        raise UserError(
            f"{', '.join(place.entry.hf)} gives {list(shard.shape)} for {place.name}, which is {list(target.shape)}",
            key="model",
            fix="make the architecture numbers of the model group those of the checkpoint's config.json",
        )
    target.copy_(shard)


def wrap(cfg: Config, config: TransformerConfig, model: GPTModel) -> DistributedDataParallel:
    """Half-precision wrapper and DDP; weights must be there already (the distributed optimizer moves them into its buffers)."""
    inner = Float16Module(config, model) if config.bf16 else model
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(**arguments.distributed_data_parallel(cfg)), inner, disable_bucketing=False
    )
    config.no_sync_func = ddp.no_sync
    if ddp.ddp_config.overlap_param_gather and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        config.param_sync_func = None  # dispatched by forward hooks; the non-interleaved schedule aligns nothing
    return ddp


def build_optimizer(cfg: Config, ddp: DistributedDataParallel) -> MegatronOptimizer:
    values = arguments.optimizer(cfg)
    for key in [key for key in values if key.endswith("dtype")]:
        values[key] = DTYPES[values[key]]
    optimizer = get_megatron_optimizer(OptimizerConfig(**values), [ddp])
    for group in optimizer.param_groups:
        # Megatron's scheduler, which is not used here, would do this: without it vectors are decayed too
        group["weight_decay"] = values["weight_decay"] * group["wd_mult"]
    return optimizer
