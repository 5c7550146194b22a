"""What transformers itself computes, for tests of both engines."""

from __future__ import annotations

import torch


def reference_routes(built: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[T - 1, L, K] that transformers' own routers choose."""
    chosen: list[torch.Tensor] = []
    routers = [module.gate for module in built.modules() if hasattr(module, "experts") and hasattr(module, "gate")]
    hooks = [router.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for router in routers]
    with torch.no_grad():
        built(tokens[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1)[:-1]
