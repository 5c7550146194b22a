"""Recorded routes: compact storage, checks, and the layout that a padded micro-batch replays.

Shape legend: T tokens of a sample, L MoE layers, K experts per token, E experts, B samples, W width of a padded batch.

Nothing here repairs a route: a wrong shape, a missing row, an expert out of range or a layer that was never written is
an error that names the sample, because training on wrong routes looks like ordinary noise in the logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runner.data import Sample
from runner.routing.reference import RouteRef, pick


class RouteError(ValueError):
    """Recorded routes that cannot be what the engine computed; never repaired."""


def storage_dtype(num_experts: int) -> torch.dtype:
    """uint8 up to 256 experts, else uint16: a quarter to an eighth of the engine's int32."""
    return torch.uint8 if num_experts <= 256 else torch.uint16


def compact(routes: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Integer routes of any width -> compact storage of the same shape; RouteError for an id outside [0, E)."""
    if routes.numel():
        low, high = int(routes.to(torch.int64).min()), int(routes.to(torch.int64).max())
        if low < 0 or high >= num_experts:
            raise RouteError(f"routes hold expert ids {low}..{high}, the model has experts 0..{num_experts - 1}")
    return routes.to(storage_dtype(num_experts))


def rows_per_expert(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Expert of each row, int64 [S] -> rows of each expert, int64 [E]. torch.bincount asks a GPU for the largest, and waits."""
    return experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))


def select_layers(routes: torch.Tensor, moe_layers: Sequence[int], num_layers: int) -> torch.Tensor:
    """`[T - 1, num_layers, K]` rows of an engine that covers every layer, dense ones too -> `[T - 1, L, K]` by global layer id.

    A model whose first layers are dense gets its routes shifted by that many layers if this is skipped.
    """
    if routes.dim() != 3 or routes.shape[1] != num_layers:
        raise RouteError(f"routes have shape {list(routes.shape)}; expected [tokens - 1, {num_layers} layers, experts per token]")
    return routes[:, list(moe_layers)]


def validate(sample: Sample, num_layers: int, top_k: int, num_experts: int) -> None:
    """Raises RouteError unless `sample.routes` is a complete `[T - 1, L, K]` record.

    A row that was never written is all zeros, which for K > 1 names expert 0 twice: a repeated expert in one row is
    therefore a missing row. For K = 1 only a layer that is zero throughout can be told (samples of 8 tokens and more).
    """
    where = f"sample {sample.sample_index} of prompt {sample.prompt_id}"
    routes = sample.routes
    if isinstance(routes, RouteRef):  # its rows were checked where they were decoded
        if len(routes) != len(sample.tokens) - 1:
            raise RouteError(f"{where}: routes have {len(routes)} rows, expected {len(sample.tokens) - 1} (tokens - 1)")
        return
    if routes is None:
        raise RouteError(f"{where} has no routes, although router replay is on: the engine recorded none")
    expected = [len(sample.tokens) - 1, num_layers, top_k]
    if list(routes.shape) != expected:
        raise RouteError(f"{where}: routes have shape {list(routes.shape)}, expected {expected} (tokens - 1, MoE layers, top-k)")
    if routes.is_floating_point():
        raise RouteError(f"{where}: routes are {routes.dtype}, expected integers")
    check_rows(routes, num_experts, where)


def check_rows(routes: torch.Tensor, num_experts: int, where: str) -> None:
    """What `validate` finds in the values of `[rows, L, K]` routes, wherever they are a part of."""
    top_k = routes.shape[-1]
    if not routes.numel():
        return
    wide = routes.to(torch.int64)
    if int(wide.min()) < 0 or int(wide.max()) >= num_experts:
        raise RouteError(f"{where}: routes name experts {int(wide.min())}..{int(wide.max())} of {num_experts}")
    zero_layers = (wide == 0).all(dim=2).all(dim=0).nonzero().flatten().tolist()
    if zero_layers and (top_k > 1 or len(wide) >= 8):
        raise RouteError(f"{where}: the routes of MoE layers {zero_layers} (counted from 0 among MoE layers) are all zero")
    if top_k > 1:
        ordered = wide.sort(dim=2).values
        repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(dim=2).nonzero()
        if len(repeated):
            token, layer = repeated[0].tolist()
            raise RouteError(f"{where}: no valid route for token {token} in MoE layer {layer}: {wide[token, layer].tolist()}")


def validate_all(samples: Sequence[Sample], num_layers: int, top_k: int, num_experts: int) -> None:
    """`validate` for many samples: one vectorized pass, then the per-sample check of the first suspect for its message."""
    if any(isinstance(sample.routes, RouteRef) for sample in samples):
        for sample in samples:
            validate(sample, num_layers, top_k, num_experts)
        return
    arrays = [sample.routes for sample in samples if isinstance(sample.routes, torch.Tensor)]
    for sample in samples:
        routes = sample.routes
        if (
            not isinstance(routes, torch.Tensor)
            or list(routes.shape) != [len(sample.tokens) - 1, num_layers, top_k]
            or routes.is_floating_point()
        ):
            validate(sample, num_layers, top_k, num_experts)
    if top_k == 1:
        for sample in samples:
            validate(sample, num_layers, top_k, num_experts)
        return
    lengths = torch.tensor([len(sample.tokens) - 1 for sample in samples])
    wide = torch.cat(arrays).to(torch.int64)
    ordered = wide.sort(dim=2).values
    bad = (ordered[..., 1:] == ordered[..., :-1]).any(dim=2) | (ordered[..., -1] >= num_experts) | (ordered[..., 0] < 0)
    if bool(bad.any()):
        row = int(bad.any(dim=1).nonzero()[0])
        index = int(torch.searchsorted(lengths.cumsum(0), row, right=True))
        validate(samples[index], num_layers, top_k, num_experts)


def padding_routes(rows: torch.Tensor, top_k: int, num_experts: int) -> torch.Tensor:
    """`[N, K]` int64 for tokens at places `rows` [N] whose output nobody reads: arange % E over all places, so that padding loads
    all experts evenly.

    Zeros would send every padding token to expert 0. Experts of one row are distinct while K <= E.
    """
    return (rows[:, None] * top_k + torch.arange(top_k)) % num_experts


def replay_layout(
    samples: Sequence[Sample], width: int, num_layers: int, top_k: int, num_experts: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes of right-padded samples: (`[L, B * W, K]` int64 to replay, `[B * W]` bool: recorded, not padding)."""
    starts, total = [row * width for row in range(len(samples))], len(samples) * width
    routes, recorded = packed_layout(samples, starts, torch.arange(total), range(num_layers), top_k, num_experts)
    return routes.to(device), recorded.to(device)


def packed_layout(
    samples: Sequence[Sample], starts: Sequence[int], rows: torch.Tensor, layers: Sequence[int], top_k: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes of samples laid end to end, each from its place in `starts` on: of tokens `rows` [N] int64 and MoE layers `layers`,
    (`[layers, N, K]` int64, `[N]` bool: recorded). Routes of other tokens and layers are left where they are.

    The last token of a sample has no recorded row (nothing is predicted after it) and counts as padding.
    """
    routes = padding_routes(rows, top_k, num_experts).unsqueeze(1).repeat(1, len(layers), 1)
    recorded = torch.zeros(len(rows), dtype=torch.bool)
    for start, sample in zip(starts, samples, strict=True):
        assert sample.routes is not None  # validated
        inside = (rows >= start) & (rows < start + len(sample.routes))
        if bool(inside.any()):
            routes[inside] = pick(sample.routes, rows[inside] - start, layers).to(torch.int64)
        recorded |= inside
    return routes.transpose(0, 1).contiguous(), recorded
