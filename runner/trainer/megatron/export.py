"""The export stream of one rank: shards gathered over tensor-parallel ranks, put into HF form, encoded by the rollout's plan.

Weights are bf16(master) at that moment. Groups never cross a shard (qat.check_format), so integers and scales are those the
trainer computes with, and those the converter makes of the BF16 export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist

from runner.config.schema import Config
from runner.data import ExportedTensor
from runner.models.family import Family
from runner.precision.codec import encode
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.trainer.megatron import names
from runner.trainer.megatron.model import Place


def passengers(cfg: Config, family: Family) -> list[str]:
    """HF tensors that this rank carries beside the model: the first rank has all of them."""
    return names.passengers(cfg.model, family) if dist.get_rank() == 0 else []


def local_weights(
    cfg: Config, where: Iterable[Place], carried: Mapping[str, torch.Tensor], format: Literal["rollout", "bf16"]
) -> Iterator[ExportedTensor]:
    """Every HF tensor whose first copy this group of ranks holds, from the group's first rank. Collective in the group."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    bf16 = TensorFormat.bf16()
    for place in where:
        for name, tensor in gather(cfg, place).items():
            wanted = plan.format_of(name) if format == "rollout" else bf16
            if place.parameter:
                yield encode(name, tensor, wanted)
            else:  # a router's selection bias keeps its dtype
                yield ExportedTensor(name, bf16.format, {name: tensor})
    for name, tensor in carried.items() if dist.get_rank() == 0 else ():
        yield ExportedTensor(name, bf16.format, {name: tensor.to(torch.bfloat16, copy=True)})


@torch.no_grad()
def gather(cfg: Config, place: Place) -> dict[str, torch.Tensor]:
    """HF name -> whole tensor on the first rank of the group that holds the first copy; {} on every other rank."""
    if not place.leader:
        return {}
    mine, group = place.tensor.detach(), place.group
    shards = [mine]
    if place.dim is not None and group.size() > 1:
        shards = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(shards, mine.contiguous(), group=group)
    if group.rank() != 0:
        return {}
    return {name: tensor.clone() for name, tensor in names.to_hf(place.entry, shards, cfg.model, place.dim).items()}
