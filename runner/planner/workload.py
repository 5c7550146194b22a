"""Sizes of one step that memory and traffic share: sequence lengths, micro-batches, routes, engines."""

from __future__ import annotations

from math import ceil

from runner.config.choices import BaseDtype
from runner.config.schema import Config

GIB = 1024**3


def base_bytes(cfg: Config) -> int:
    """Of one value that is not quantized."""
    return 4 if cfg.precision.base_dtype == BaseDtype.float32 else 2


def longest_sequence_tokens(cfg: Config) -> int:
    """Prompt and response at their limits, within the context."""
    return min(cfg.task.max_prompt_tokens + cfg.rollout.sampling.max_response_tokens, cfg.model.max_context_tokens)


def micro_batch_tokens(cfg: Config) -> int:
    """Tokens of one micro-batch on one rank: a sequence is never cut, so the longest one may exceed max_tokens_per_gpu."""
    return max(cfg.trainer.max_tokens_per_gpu, ceil(longest_sequence_tokens(cfg) / cfg.parallelism.cp))


def samples_per_step(cfg: Config) -> int:
    return cfg.algorithm.prompts_per_step * cfg.algorithm.samples_per_prompt


def route_itemsize(cfg: Config) -> int:
    """Expert ids are uint8 up to 256 experts, else uint16."""
    return 1 if cfg.model.num_experts <= 256 else 2


def routes_per_token_bytes(cfg: Config) -> int:
    """R3 (arXiv 2510.11370): one expert id per MoE layer and choice."""
    model = cfg.model
    if model.num_experts == 0:
        return 0
    return (model.num_layers - model.num_dense_layers) * model.experts_top_k * route_itemsize(cfg)


def route_bytes_per_step(cfg: Config) -> int:
    """Upper bound: every sample as long as it may be. 0 without router replay."""
    if not cfg.router_replay.rollout:
        return 0
    return samples_per_step(cfg) * (longest_sequence_tokens(cfg) - 1) * routes_per_token_bytes(cfg)
