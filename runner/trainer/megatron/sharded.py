"""How what a rank holds lies in a checkpoint: every tensor in its parameter's shape, and which part of it this rank has.

DistributedOptimizer's own formats are not used: `fully_reshardable` mixes up masters and moments without an error when a
buffer has several buckets with padding between them, and without Transformer Engine the resume shares one Adam `step` tensor
between all parameters. Here every owned shard is put at its place in its parameter, whatever the buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import nn

from runner.trainer.megatron.masters import STATES, Masters, Owned
from runner.trainer.megatron.model import Place

Sharded = dict[str, Any]  # name -> tensor with its place in the whole


def model_weights(model: GPTModel) -> Sharded:
    """Megatron's own sharded state dict; `_extra_state` of Transformer Engine (FP8 scales) is derived, not kept."""
    return {key: value for key, value in model.sharded_state_dict().items() if not key.endswith("_extra_state")}


def replicated(group: str, tensors: dict[str, torch.Tensor]) -> Sharded:
    """Tensors that are whole and equal on every rank that has them, as `<group>.<name>`."""
    return {
        name: ShardedTensor.from_rank_offsets(f"{group}.{name}", tensor, replica_id=dist.get_rank())
        for name, tensor in tensors.items()
    }


def adam_step(masters: Masters, device: torch.device) -> float:
    """Adam's step, equal for all parameters of all ranks (a rank may own nothing). Collective."""
    mine = max((owned.step_count() for owned in masters.owned), default=0.0)
    steps = torch.tensor([mine], dtype=torch.float64, device=device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return float(steps.item())


def _sharding(model: GPTModel) -> dict[nn.Parameter, ShardedTensor | ShardedTensorFactory]:
    """Parameter -> how Megatron divides it."""
    found = {}
    for value in model.sharded_state_dict().values():
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and isinstance(value.data, torch.Tensor):
            found[value.data.data_ptr()] = value
    return {p: found[p.data_ptr()] for p in model.parameters() if p.data_ptr() in found}


def optimizer(model: GPTModel, ddp: DistributedDataParallel, masters: Masters, *, stepped: bool, filled: bool) -> Sharded:
    """`<state>.<parameter name>` -> sharded fp32 tensor in parameter shape, moments only where `stepped`. `filled`: with what
    the ranks own, gathered; else zeros, to be loaded into.

    Every rank of a data-parallel group takes part in filling each parameter, in the order of the model's parameters.
    """
    by_parameter = {owned.parameter: owned for owned in masters.owned}
    sharding = _sharding(model)
    result: Sharded = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for state in STATES if stepped else ("param",):
            whole = torch.zeros(parameter.shape, dtype=torch.float32)
            if filled:
                whole = _whole(ddp, parameter, by_parameter.get(parameter), state)
            result[f"{state}.{name}"] = _like(sharding[parameter], f"optimizer.{state}.{sharding[parameter].key}", whole)
    return result


def _like(sharding: Any, key: str, data: torch.Tensor) -> Any:
    if isinstance(sharding, ShardedTensorFactory):
        return replace(sharding, key=key, data=data)
    return replace(sharding, key=key, data=data, dtype=data.dtype)


def _whole(ddp: DistributedDataParallel, parameter: nn.Parameter, owned: Owned | None, state: str) -> torch.Tensor:
    """A parameter's master or moment in parameter shape, in host memory; shards are gathered over data-parallel ranks."""
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if owned is not None:
        flat[owned.start : owned.stop] = owned.tensors()[state].to(flat.device)
    if ddp.ddp_config.use_distributed_optimizer:
        group = ddp.param_to_bucket_group[parameter].intra_distributed_optimizer_instance_group
        dist.all_reduce(flat, group=group)
    return flat.view(parameter.shape).cpu()


def reference(model: GPTModel, weights: Iterable[tuple[Place, torch.Tensor]]) -> Sharded:
    """The reference policy's weights, one for each place, divided as the model's are."""
    sharding = _sharding(model)
    result: Sharded = {}
    for place, tensor in weights:
        assert isinstance(place.tensor, nn.Parameter)
        like = sharding[place.tensor]
        result[place.name] = _like(like, f"reference.{like.key}", tensor)
    return result


@torch.no_grad()
def restore_masters(model: GPTModel, masters: Masters, loaded: dict[str, torch.Tensor], step: float) -> None:
    """Masters and moments from what `optimizer` named; Adam goes on from `step`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for owned in masters.owned:
        name, tensors = names[owned.parameter], {}
        for state in STATES if step else ("param",):
            flat = loaded[f"{state}.{name}"].reshape(-1)
            tensors[state] = flat[owned.start : owned.stop].to(owned.parameter.device)
        owned.restore(tensors, step)


@torch.no_grad()
def restore_buffers(model: GPTModel, places: Iterable[Place], loaded: dict[str, torch.Tensor]) -> None:
    """Routers' selection biases; parameters follow from the masters."""
    for place in places:
        if not place.parameter:
            key = next(name for name, buffer in model.named_buffers() if buffer is place.tensor)
            place.tensor.copy_(loaded[key])
