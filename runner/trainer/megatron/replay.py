"""R3 through megatron-core's own RouterReplay: recorded routes in logprob, forward, backward and recompute passes.

RouterReplay (one per router) keeps a target for the forward and a list of targets for recomputation that only a backward
empties. So indices are cleared after every no-grad pass, the action is set per micro-batch, and at the end of a step the
list is checked. Megatron gathers the chosen experts' own scores, so the router keeps its gradient.

Shape legend: T tokens of a micro-batch, T' those of this context- and sequence-parallel rank, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from runner.config.schema import ModelConfig
from runner.data import Sample
from runner.routing.routes import RouteError, packed_layout
from runner.trainer.megatron.packing import Packed


class Replay:
    """Replays recorded routes in one rank's decoder layers.

    `moe_layers`: global ids of all MoE layers, in the order of the routes' layer dimension. Routers of
    multi-token-prediction layers have instances too and are left out.
    """

    def __init__(self, model: GPTModel, config: ModelConfig, moe_layers: Sequence[int], *, recomputes: bool) -> None:
        self.config = config
        self.recomputes = recomputes  # whether a backward runs the routers again
        order = {layer: index for index, layer in enumerate(moe_layers)}
        self.routers: list[tuple[int, TopKRouter]] = []
        for module in model.decoder.modules():
            if isinstance(module, TopKRouter):
                assert module.layer_number is not None and module.router_replay is not None
                self.routers.append((order[module.layer_number - 1], module))
        self._recorded: torch.Tensor | None = None  # [T'] bool of the current micro-batch
        self._counting = False
        self._differs: torch.Tensor | int = 0
        self._counted: torch.Tensor | int = 0
        self._wrong: torch.Tensor | int = 0
        for index, (_, router) in enumerate(self.routers):
            self._watch(index, router)

    def _watch(self, index: int, router: TopKRouter) -> None:
        """Count how often the router's own top-k differs, and that what it returns are the recorded experts."""
        replay: RouterReplay = router.router_replay
        inner = replay.get_replay_topk

        def get_replay_topk(
            scores: torch.Tensor, topk: int, num_groups: Any = None, group_topk: Any = None, default: Any = None
        ) -> Any:
            if replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD and self._counting:
                own = default(scores, topk, num_groups, group_topk)[1]
                self._count(own, replay.target_topk_idx)
            return inner(scores, topk, num_groups, group_topk, default)

        def check(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
                routing_map, targets = output[1], replay.target_topk_idx
                obeyed = routing_map.gather(1, targets.to(routing_map.device)).all() & (routing_map.sum() == targets.numel())
                self._wrong = self._wrong + (~obeyed).to(torch.int64)

        replay.get_replay_topk = get_replay_topk
        router.register_forward_hook(check)

    def _count(self, own: torch.Tensor, targets: torch.Tensor) -> None:
        assert self._recorded is not None
        same = (own.sort(dim=1).values == targets.sort(dim=1).values).all(dim=1)
        self._differs = self._differs + (~same & self._recorded).sum()
        self._counted = self._counted + self._recorded.sum()

    def begin(self, samples: Sequence[Sample], packed: Packed, *, counting: bool) -> None:
        """Before the forward of a micro-batch: hand every local router the routes of its own tokens."""
        chosen = [samples[i] for i in packed.micro.indices]
        model, device = self.config, packed.micro.tokens.device
        rows, layers = _local_tokens(packed.rows.cpu()), [layer for layer, _ in self.routers]
        routes, recorded = packed_layout(chosen, packed.starts, rows, layers, model.experts_top_k, model.num_experts)
        self._recorded = recorded.to(device)
        self._counting = counting
        for (_, router), targets in zip(self.routers, routes, strict=True):
            router.router_replay.set_target_indices(targets.to(device))
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def forward_done(self) -> None:
        """After the forward: from now on a router that runs is one that a backward recomputes."""
        for _, router in self.routers:
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def clear(self) -> None:
        """No indices and no action: routers choose by themselves."""
        for _, router in self.routers:
            router.router_replay.clear_indices()
            router.router_replay.clear_router_replay_action()
        self._recorded = None

    def end_of_step(self) -> None:
        """After the backward of every micro-batch: recomputation must have consumed exactly what the forwards queued."""
        left = {len(router.router_replay.replay_backward_list) for _, router in self.routers}
        self.clear()
        if self.recomputes and left - {0}:
            raise RouteError(f"{max(left)} micro-batches' routes were queued for recomputation and never used")

    def take_statistics(self) -> dict[str, float]:
        """`router_replay/disagreement` since the last call, over all ranks; RouteError when a router disobeyed. Collective."""
        device = next(iter(self.routers))[1].weight.device if self.routers else torch.device("cpu")
        sums = torch.tensor([float(x) for x in (self._differs, self._counted, self._wrong)], dtype=torch.float64)
        sums = sums.to(device)
        dist.all_reduce(sums)
        self._differs = self._counted = self._wrong = 0
        differs, counted, wrong = sums.tolist()
        if wrong:
            raise RouteError(f"in {wrong:.0f} routers' passes the experts used differ from the recorded routes")
        return {"router_replay/disagreement": differs / counted} if counted else {}


def _local_tokens(rows: torch.Tensor) -> torch.Tensor:
    """The context-parallel rank's rows [T / cp] -> those that its sequence-parallel part sees."""
    group = parallel_state.get_tensor_model_parallel_group()
    sequence_parallel = group.size() > 1  # Megatron's experts need sequence parallelism with tp > 1
    return rows.chunk(group.size())[group.rank()] if sequence_parallel else rows
