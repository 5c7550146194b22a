"""What transformers itself computes, for tests of both engines."""

from __future__ import annotations

from typing import Any

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


def rows_before_a_tie(built: torch.nn.Module, tokens: torch.Tensor, gap: float = 1e-5) -> int:
    """How many of a sequence's T - 1 rows come before the first at which some router's last chosen and first left out
    probability differ by less than `gap` of it: two right programs may choose differently there, and every later row differs."""
    first = [len(tokens) - 1]

    def look(_module: Any, _inputs: Any, out: tuple[torch.Tensor, ...]) -> None:
        best = out[0].float().softmax(-1).topk(out[2].shape[-1] + 1, -1).values
        near = (best[:, -2] - best[:, -1]) < gap * best[:, -2]
        first.extend(near.nonzero()[:, 0].tolist())

    routers = [module.gate for module in built.modules() if hasattr(module, "experts") and hasattr(module, "gate")]
    hooks = [router.register_forward_hook(look) for router in routers]
    with torch.no_grad():
        built(tokens[None])
    for hook in hooks:
        hook.remove()
    return min(first)
