"""sgl_kernel.speculative: what n-gram drafting calls."""

from __future__ import annotations

import torch


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor, seq_lens: torch.Tensor, positions: torch.Tensor, retrieve_index: torch.Tensor,
    next_token: torch.Tensor, next_sibling: torch.Tensor, batch: int, count: int,
) -> None:  # fmt: skip
    """Ancestors' mask [B, N, N] -> positions, first children and next siblings, each [B, N]."""
    nodes = torch.arange(count)
    ancestors = tree_mask.view(batch, count, count).bool() & torch.ones(count, count, dtype=torch.bool).tril(-1)
    positions.view(batch, count).copy_(ancestors.sum(-1) + seq_lens.view(batch, 1))
    retrieve_index.view(batch, count).copy_(nodes + torch.arange(batch).view(batch, 1) * count)
    parent = torch.where(ancestors, nodes, -1).amax(-1)
    is_child = parent[:, :, None] == nodes[None, None, :]  # [B, child, parent]
    child = torch.where(is_child, nodes.view(count, 1), count).amin(1)
    next_token.view(batch, count).copy_(torch.where(child < count, child, -1))
    later_sibling = (parent[:, :, None] == parent[:, None, :]) & (nodes[:, None] > nodes[None, :])
    sibling = torch.where(later_sibling, nodes.view(count, 1), count).amin(1)
    next_sibling.view(batch, count).copy_(torch.where((parent >= 0) & (sibling < count), sibling, -1))
