"""Hooks for every device: no key in a log, no port that is open to the network, an end without a wait of five
seconds, shared memory that says whose it is, configs that SGLang's models have and transformers does not know."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from runner import models
from runner.rollout.sglang.plugin.shared import shared_file, shared_segment
from runner.weights.transports import broadcast


def register() -> None:
    HookRegistry.register("sglang.srt.entrypoints.engine._server_args_for_logging", _without_keys, HookType.AFTER)
    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog", _prompt_watchdog, HookType.AROUND
    )
    HookRegistry.register("sglang.srt.managers.load_snapshot.shm_path_for", _shared_file, HookType.AROUND)
    HookRegistry.register("sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _seeds, HookType.AFTER)
    HookRegistry.register("sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", _truncated, HookType.AROUND)
    for module in ("device_communicators.shm_broadcast", "parallel_state"):
        HookRegistry.register(f"sglang.srt.distributed.{module}.make_shm_name", _shared_segment, HookType.AROUND)
    _local_store()
    models.register_architectures()  # checkpoints bring code for this, which engines do not run


def _local_store() -> None:
    """An engine's processes meet at a store of torch's, which listens on every interface whatever its address is."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # the package has a function of that name

    def create(host: str, port: int, rank: int, size: int, timeout: timedelta, use_libuv: bool = True) -> Any:
        return broadcast.open_store(host, port, size, rank == 0, timeout)

    rendezvous._create_c10d_store = create


def _without_keys(result: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {key: "***" if key in ("api_key", "admin_api_key") and value else value for key, value in result.items()}


def _shared_file(original: Callable[[str], str], ipc_name: str) -> str:
    """A name that says whose it is: the process group, which all processes of a server share."""
    return str(shared_file(os.getpgid(0), original(ipc_name).rpartition("_")[2].removesuffix(".shm")))


def _shared_segment(original: Callable[[str], str], kind: str) -> str:
    return shared_segment(kind, os.getpgid(0), original(kind).partition(f"_{kind}_")[2])


async def _prompt_watchdog(original: Callable[[Any], Awaitable[None]], self: Any) -> None:
    """SGLang looks every five seconds whether it was asked to end; what it then does (drain, release, end) stays its own."""
    while not self.gracefully_exit:
        await asyncio.sleep(0.1)
    await original(self)


def _seeds(result: Any, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Every request samples from its own stream. SGLang hands seeds on only under enable_deterministic_inference, which is slower
    and knows no CPU attention backend; its seeded sampler itself runs anywhere (with sampling_backend=pytorch).

    Every batch has seeds, also one of requests that sample nothing (scores, SGLang's own health check): merging it with one that
    has them would leave fewer seeds than requests, and the next filter ends the scheduler."""
    seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
    result.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)


def _truncated(
    original: Any,
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    **others: Any,
) -> Any:
    """A token drawn with noise by vocabulary id, whatever else is in the batch.

    SGLang takes this way for every row of a batch in which one request truncates (its own health check is greedy, an evaluation
    is), and numbers the noise by rank there: the same request would then get other tokens than in a batch of its own kind."""
    if sampling_seed is None or others.get("return_filtered_probs"):
        return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **others)
    from sglang.srt.layers.sampler import sampling_from_probs_torch

    kept = _kept(probs, top_ks, top_ps, min_ps if need_min_p_sampling else None)
    return sampling_from_probs_torch(kept, sampling_seed=sampling_seed, positions=positions)


def _kept(probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None) -> torch.Tensor:
    """[N, V] like `probs`, 0 where a row's top-k, top-p or min-p leaves a token out; the same bits elsewhere."""
    ordered, ids = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    cut = torch.arange(probs.shape[-1], device=probs.device) >= top_ks[:, None]
    cut |= (before > top_ps[:, None]) & (top_ps[:, None] < 1)  # rounding can take the sum of all above 1
    if min_ps is not None:
        cut |= ordered < ordered[:, :1] * min_ps[:, None]
    return torch.zeros_like(probs).scatter_(-1, ids, ordered.masked_fill(cut, 0.0))
