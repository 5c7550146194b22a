"""The section of the config that is trainer=megatron's. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from runner.config.choices import TokenDispatcher
from runner.config.limits import LONGEST_SECONDS, number, path
from runner.config.schema import TrainerConfig


@dataclass
class MegatronTrainerConfig(TrainerConfig):
    distributed_optimizer: bool = MISSING
    overlap_param_gather: bool = MISSING
    overlap_grad_reduce: bool = MISSING
    gradient_accumulation_fusion: bool = MISSING
    permute_fusion: bool = MISSING  # Transformer Engine's fused permutation of tokens to experts
    precision_aware_optimizer: bool = MISSING
    router_fusion: bool = MISSING
    moe_token_dispatcher: TokenDispatcher = MISSING
    resident_reference: bool = MISSING  # false: reference weights are swapped in from host memory
    grad_bucket_elements: Optional[int] = number(ge=1, le=2**40)  # parameters per communication bucket; null: Megatron's choice
    rank_timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS)  # a rank that is silent for this long counts as dead
    initial_checkpoint: Optional[str] = path()  # of another run, whose weights this one starts from; any layout
    async_save: bool = MISSING  # write checkpoints beside the next steps, from processes forked at their moment
    max_restarts: int = number(ge=0, le=1000)  # of all ranks from the last checkpoint after one died; 0: the run ends
