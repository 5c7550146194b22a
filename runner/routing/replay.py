"""R3 (rollout routing replay, arXiv 2510.11370): the trainer's forward goes through the experts that the engine chose.

Hooks on the model's router modules replace the chosen experts and recompute their weights from the router's OWN logits,
so the router still gets its gradient. The hooks also run in a recomputed forward, and read the same micro-batch there.
What the expert modules receive is compared with the record on every pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runner.config.choices import RouterScore
from runner.routing.routes import RouteError

# Qwen3-VL's and Qwen3's routers divide softmax weights by their sum without an epsilon, DeepSeek's sigmoid router adds this.
SIGMOID_EPSILON = 1e-20


def replayed_weights(
    logits: torch.Tensor, experts: torch.Tensor, *, score: RouterScore, normalize: bool, scaling: float
) -> torch.Tensor:
    """Routing weights [N, K] fp32 of the given experts [N, K] from router logits [N, E].

    softmax: softmax(fp32 logits) gathered, divided by their sum if `normalize` (Qwen3-MoE), times `scaling` (DeepSeek-V2).
    sigmoid: sigmoid(fp32 logits) gathered (the selection bias takes no part), divided by sum + 1e-20 if `normalize`, times
    `scaling` (DeepSeek-V3).
    top_k_softmax: softmax of the gathered logits, in the logits' dtype (gpt-oss).
    """
    if score == RouterScore.top_k_softmax:
        return torch.softmax(logits.gather(1, experts), dim=-1).float()
    if score == RouterScore.softmax:
        chosen = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, experts)
        return (chosen / chosen.sum(dim=-1, keepdim=True) if normalize else chosen) * scaling
    chosen = logits.float().sigmoid().gather(1, experts)
    if normalize:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + SIGMOID_EPSILON)
    return chosen * scaling


@dataclass
class CurrentRoutes:
    """The micro-batch being replayed: routes `[L, N, K]`, recorded `[N]`; `first_pass` is False once backward may recompute."""

    routes: torch.Tensor
    recorded: torch.Tensor
    first_pass: bool = True


class RouterReplay:
    """Replays recorded routes in `model`; outside of `replaying` the model routes as it wants.

    `router_names`: module names of the routers, in the order of the routes' layer dimension. Each router is a transformers
    module that returns (logits, weights, experts) and has its `experts` module as a sibling. `normalizes`: whether weights sum
    to one, of routers that do not say so themselves (`Family.normalizes_top_k`).
    """

    def __init__(self, model: nn.Module, router_names: Sequence[str], score: RouterScore, *, normalizes: bool = True) -> None:
        self.score, self.normalizes = score, normalizes
        self.num_layers = len(router_names)
        self._current: CurrentRoutes | None = None
        self._wrong: torch.Tensor | None = None  # expert ids that an experts module got and the record does not say
        self._differs: list[torch.Tensor] = []
        self._counted: list[torch.Tensor] = []
        self._own: list[torch.Tensor | None] | None = None
        for layer, name in enumerate(router_names):
            router = model.get_submodule(name)
            experts = model.get_submodule(name.rpartition(".")[0]).get_submodule("experts")
            router.register_forward_hook(self._route_hook(layer))
            experts.register_forward_pre_hook(self._check_hook(layer), with_kwargs=True)

    @contextmanager
    def replaying(self, routes: torch.Tensor, recorded: torch.Tensor) -> Iterator[CurrentRoutes]:
        """Forward and backward of one micro-batch: routes `[L, N, K]` int64, recorded `[N]` bool (False: padding)."""
        if routes.shape[0] != self.num_layers:
            raise RouteError(f"routes cover {routes.shape[0]} MoE layers, the model has {self.num_layers}")
        self._current = CurrentRoutes(routes, recorded)
        try:
            yield self._current
        finally:
            self._current = None

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor | None]]:
        """Collects the experts [N, K] that each MoE layer used in the last forward, in layer order."""
        self._own = [None] * self.num_layers
        try:
            yield self._own
        finally:
            self._own = None

    def take_statistics(self) -> dict[str, float]:
        """`router_replay/disagreement` since the last call: the share of (recorded token, layer) whose own top-k SET differs.

        Raises RouteError when an experts module was given other experts than recorded. Empty if nothing was replayed.
        """
        if self._wrong is not None:
            wrong = int(self._wrong)
            self._wrong = None
            if wrong:
                raise RouteError(f"{wrong} expert ids used in the trainer's forward differ from the recorded routes")
        if not self._counted:
            return {}
        total = int(torch.stack(self._counted).sum())
        differs = int(torch.stack(self._differs).sum())
        self._counted, self._differs = [], []
        return {"router_replay/disagreement": differs / max(total, 1)}

    def _route_hook(self, layer: int) -> Any:
        def hook(router: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            current = self._current
            if current is None:
                return None
            logits, weights, own = output
            routes = current.routes[layer]
            if own.shape != routes.shape:
                raise RouteError(
                    f"MoE layer {layer} routes {list(own.shape)} (tokens, top-k), the record has {list(routes.shape)}"
                )
            if current.first_pass:
                self._count(own, routes, current.recorded)
            replayed = replayed_weights(
                logits,
                routes,
                score=self.score,
                normalize=bool(getattr(router, "norm_topk_prob", self.normalizes)),
                scaling=float(getattr(router, "routed_scaling_factor", 1.0)),
            )
            return logits, replayed.to(weights.dtype), routes

        return hook

    def _check_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            used = args[1] if len(args) > 1 else kwargs["top_k_index"]
            if self._own is not None:
                self._own[layer] = used.detach().clone()
            if self._current is not None:
                wrong = (used != self._current.routes[layer]).sum()
                self._wrong = wrong if self._wrong is None else self._wrong + wrong

        return hook

    def _count(self, own: torch.Tensor, routes: torch.Tensor, recorded: torch.Tensor) -> None:
        same_set = (own.sort(dim=1).values == routes.sort(dim=1).values).all(dim=1)
        self._differs.append((~same_set & recorded).sum())
        self._counted.append(recorded.sum())
