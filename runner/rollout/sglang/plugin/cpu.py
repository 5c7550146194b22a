"""The CPU twin: what SGLang's own CPU path needs beside the kernels that nobody publishes a wheel of."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from runner.config.schema import CpuMatmul
from runner.precision import cpu_matmul


def register() -> None:
    if torch.cuda.is_available():
        raise RuntimeError("runner's CPU twin of SGLang does not load where CUDA is present")
    way, reason = cpu_matmul.install(CpuMatmul.auto)  # what the driver took stands in the environment
    print(f"bf16 matrices on this CPU: {way.name}, {reason}", flush=True)
    _host_memory()
    _speculative_attention()
    _latent_attention()
    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.release_memory_occupation",
        _emptied,
        HookType.AFTER,
    )
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", _own_experts, HookType.AROUND)


def _host_memory() -> None:
    """The host cache of routed experts is pinned through cudaHostRegister even for device="cpu"."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: Any, dtype: torch.dtype, device: str, **_: Any) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _speculative_attention() -> None:
    """torch_native attention does not verify drafts. SGLang's intel_amx backend does; its two attention operators come from
    the stand-in for sgl_kernel. (SGLang itself turns "intel_amx" into "torch_native" where it finds no AMX kernels.)"""
    from sglang.srt.layers.attention import attention_registry

    backends = attention_registry.ATTENTION_BACKENDS
    native = backends["torch_native"]

    def choose(runner: Any) -> Any:
        from sglang.srt.runtime_context import get_spec

        return (backends["intel_amx"] if get_spec().speculative_num_draft_tokens else native)(runner)

    backends["torch_native"] = choose
    HookRegistry.register(
        "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend", _drafting_attention, HookType.AROUND
    )


def _drafting_attention(original: Any, self: Any, name: str, known: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A draft model's own attention, for the same reason."""
    return original(self, name, {**known, "torch_native": known["intel_amx"]}, *args, **kwargs)


def _latent_attention() -> None:
    """Latent attention (MLA) through torch_native, which knows one way only: attend over what the cache holds.

    SGLang would expand keys and values in a prefill and hand them over beside the cache; torch_native ignores those. The
    absorbed form, which SGLang takes when it decodes, attends over the cached latents themselves, and is right in a prefill too.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    attention_backend_handler.AttentionBackendRegistry.register("torch_native", lambda attn, batch: AttnForwardMethod.MLA)
    _plain_rotary_embedding()


def _plain_rotary_embedding() -> None:
    """SGLang's rotary embedding of latent attention on a CPU knows yarn only; the one for every other model knows the rest."""
    from sglang.srt.layers.rotary_embedding import factory

    with_yarn = factory.get_rope_cpu
    signature, plain = inspect.signature(with_yarn), inspect.signature(factory.get_rope).parameters

    def choose(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        if asked.get("rope_scaling") is not None:
            return with_yarn(*args, **kwargs)
        return factory.get_rope(**{name: value for name, value in asked.items() if name in plain})

    factory.get_rope_cpu = choose


def _own_experts(original: Any, layer: Any, hidden: torch.Tensor, topk: Any, config: Any) -> torch.Tensor:
    """Expert parallel: -1 stands for an expert of another rank, which the plain implementation does not know. The ranks' parts
    are summed outside."""
    if not bool((topk.topk_ids < 0).any()):
        computed: torch.Tensor = original(layer, hidden, topk, config)
        return computed
    token, place = (topk.topk_ids >= 0).nonzero(as_tuple=True)
    own = topk._replace(topk_weights=topk.topk_weights[token, place, None], topk_ids=topk.topk_ids[token, place, None])
    part = torch.zeros_like(hidden, dtype=torch.float32)
    if len(token):
        part.index_add_(0, token, original(layer, hidden[token], own, config).float())
    return part.to(hidden.dtype)


def _emptied(result: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Memory that was given back comes back with undefined content. A CPU server keeps its own: it is overwritten, so that
    nothing works here that would not work on a GPU."""
    if not request.tags or "weights" in request.tags:
        for parameter in self.tp_worker.model_runner.model.parameters():
            parameter.data.untyped_storage().fill_(0xFF)
    return result
