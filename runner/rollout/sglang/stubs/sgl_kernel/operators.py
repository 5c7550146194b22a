"""The operators of sgl_kernel that SGLang's CPU path calls when it speculates, in plain torch: correct, not fast.

Shape legend: B requests, N draft tokens per request (the root among them), n query rows, m cached rows, h heads, d head width.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]
QLEN_ONLY = 1  # TreeMaskMode: the mask holds the draft tokens only


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """q [n, h, d], k and v [m, h_kv, d], mask [n, m] bool -> [n, h, d]."""
    shared = q.shape[1] // k.shape[1]
    rows = (t.transpose(0, 1).to(q.dtype) for t in (k, v))
    keys, values = (t.repeat_interleave(shared, 0) for t in rows)
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=mask, scale=scale)
    return out.transpose(0, 1)


def _plain_only(logit_cap: float, cross: Any, window: int, encoder_lens: Any, sinks: Any) -> None:
    if logit_cap or cross or window > 0 or encoder_lens is not None or sinks is not None:
        raise NotImplementedError("runner's stand-in for sgl_kernel knows plain causal attention only")


def decode_attention_cpu(
    q: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, k_scale: Any, v_scale: Any, out: torch.Tensor,
    key: torch.Tensor | None, value: torch.Tensor | None, loc: torch.Tensor, attn_logits: Any, req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, scaling: float, logit_cap: float, cross: Any, window: int,
    encoder_lens: Any, sinks: Any,
) -> None:  # fmt: skip
    _plain_only(logit_cap, cross, window, encoder_lens, sinks)
    if key is not None and value is not None:
        k_buffer[loc] = key.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = value.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    for row in range(seq_lens.shape[0]):
        slots = req_to_token[req_pool_indices[row], : int(seq_lens[row])].long()
        out[row : row + 1] = _attend(q[row : row + 1], k_buffer[slots], v_buffer[slots], scaling, None)


def extend_attention_cpu(
    q: torch.Tensor, k: Any, v: Any, out: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, k_scale: Any,
    v_scale: Any, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor, extend_start_loc: torch.Tensor, max_len_extend: int, scaling: float, logit_cap: float,
    cross: Any, window: int, encoder_lens: Any, sinks: Any, tree_mask: torch.Tensor | None, is_causal: bool,
) -> None:  # fmt: skip
    _plain_only(logit_cap, cross, window, encoder_lens, sinks)
    offset = 0
    for row in range(seq_lens.shape[0]):
        cached, new, start = int(seq_lens[row]), int(extend_seq_lens[row]), int(extend_start_loc[row])
        slots = req_to_token[req_pool_indices[row], :cached].long()
        mask = torch.ones(new, cached, dtype=torch.bool)
        if tree_mask is not None:
            mask[:, cached - new :] = tree_mask[offset : offset + new * new].view(new, new).bool()
            offset += new * new
        elif is_causal:
            mask = mask.tril(cached - new)
        out[start : start + new] = _attend(q[start : start + new], k_buffer[slots], v_buffer[slots], scaling, mask)


def murmur_hash32_cpu(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits) of the words (seed low, seed high, position, column) -> int64 [n, m] in [0, 2^32).

    What SGLang's seeded sampler draws its uniform numbers from: they depend on the request's seed and the token's position
    only, not on the batch."""
    wide = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = torch.zeros(len(wide), 1, dtype=torch.int64)
    for word in (wide & MASK, (wide >> 32) & MASK, positions.to(torch.int64).reshape(-1)):
        state = _mix(state, word.unsqueeze(1))
    state = _mix(state, columns.to(torch.int64).unsqueeze(0)) ^ 16  # the length in bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & MASK
    return state ^ (state >> 16)


MASK = 0xFFFFFFFF


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotated((word * 0xCC9E2D51) & MASK, 15)
    state = _rotated(state ^ ((word * 0x1B873593) & MASK), 13)
    return (state * 5 + 0xE6546B64) & MASK


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & MASK


# SGLang calls these as registered operators.
setattr(torch.ops.sgl_kernel, "murmur_hash32_cpu", SimpleNamespace(default=murmur_hash32_cpu))  # noqa: B010
setattr(torch.ops.sgl_kernel, "decode_attention_cpu", decode_attention_cpu)  # noqa: B010
setattr(torch.ops.sgl_kernel, "extend_attention_cpu", extend_attention_cpu)  # noqa: B010


def copy_all_layer_kv_cache_cpu(
    pointers: torch.Tensor, strides: torch.Tensor, target: torch.Tensor, source: torch.Tensor
) -> None:
    """Move rows of every layer's cache, given by address and bytes per row; all rows are read before any is written."""
    for pointer, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(pointer + slot * stride, stride) for slot in source.tolist()]
        for row, slot in zip(rows, target.tolist(), strict=True):
            ctypes.memmove(pointer + slot * stride, row, stride)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor, pool_len: int,
    topk: int, steps: int,
) -> None:  # fmt: skip
    count = topk * steps
    for row in range(seq_lens.shape[0]):
        start = int(seq_lens[row])
        out[row * count : (row + 1) * count] = req_to_token[req_pool_indices[row], start : start + count]


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start: torch.Tensor, end: torch.Tensor, out: torch.Tensor,
    pool_len: int,
) -> None:  # fmt: skip
    position = 0
    for row in range(req_pool_indices.shape[0]):
        first, last = int(start[row]), int(end[row])
        out[position : position + last - first] = req_to_token[req_pool_indices[row], first:last]
        position += last - first


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start: torch.Tensor, end: torch.Tensor,
    out_cache_loc: torch.Tensor, pool_len: int,
) -> None:  # fmt: skip
    position = 0
    for row in range(req_pool_indices.shape[0]):
        first, last = int(start[row]), int(end[row])
        slots = out_cache_loc[position : position + last - first]
        req_to_token[req_pool_indices[row], first:last] = slots.to(req_to_token.dtype)
        position += last - first


def fill_bonus_tokens_cpu(accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus: torch.Tensor, stride: int) -> None:
    rows = torch.arange(accept_lens.shape[0])
    bonus.copy_(accept_tokens.flatten()[rows * stride + accept_lens.long() - 1])


def fill_accept_out_cache_loc_cpu(accept_index: torch.Tensor, out_cache_loc: torch.Tensor, target: torch.Tensor) -> None:
    accepted = accept_index.flatten()
    accepted = accepted[accepted > -1].long()
    target[: accepted.numel()] = out_cache_loc[accepted]


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, topk: int, steps: int, pool_len: int
) -> torch.Tensor:
    out = req_to_token[req_pool_indices].repeat_interleave(topk, 0).clone()
    for row in range(seq_lens.shape[0]):
        length = int(seq_lens[row])
        for branch in range(topk):
            drafted = req_to_token[req_pool_indices[row], length + branch * steps : length + (branch + 1) * steps]
            out[row * topk + branch, length : length + steps] = drafted
    return out


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor, selected: torch.Tensor, seq_lens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor,
    retrieve_index: torch.Tensor, next_token: torch.Tensor, next_sibling: torch.Tensor, topk: int, depth: int, count: int,
    mode: Any,
) -> None:  # fmt: skip
    """The draft tree of each request as first-child and next-sibling links, positions and the ancestors' mask [B, N, N]."""
    if int(mode) != QLEN_ONLY:
        raise NotImplementedError("runner's stand-in for sgl_kernel builds masks over draft tokens only")
    batch = seq_lens.shape[0]
    retrieve_index, next_token, next_sibling = (t.view(batch, count) for t in (retrieve_index, next_token, next_sibling))
    positions, mask = positions.view(batch, count), mask.view(batch, count, count)
    for row in range(batch):
        chosen, parents, length = selected[row].tolist(), parent_list[row].tolist(), int(seq_lens[row])
        above = [0] + [_parent(node, chosen, parents, topk, count) for node in range(1, count)]
        retrieve_index[row] = torch.arange(count) + row * count
        positions[row, 0] = length
        mask[row] = False
        mask[row, :, 0] = True
        for node in range(count - 1, 0, -1):
            parent = above[node]
            if parent is not None:
                if int(next_token[row, parent]) != -1:
                    next_sibling[row, node] = next_token[row, parent]
                next_token[row, parent] = node
        for node in range(1, count):
            level, current = 0, node
            while current and level < depth:
                level += 1
                mask[row, node, current] = True
                current = above[current] or 0
            positions[row, node] = length + level


def _parent(node: int, chosen: list[int], parents: list[int], topk: int, count: int) -> int | None:
    """Place of a node's parent among the chosen ones, 0 for the root, None when it was not chosen."""
    block = chosen[node - 1] // topk
    if block == 0:
        return 0
    return chosen.index(parents[block]) + 1 if parents[block] in chosen[: count - 1] else None


def verify_tree_greedy_cpu(
    predicts: torch.Tensor, accept_index: torch.Tensor, accept_token_num: torch.Tensor, candidates: torch.Tensor,
    retrive_index: torch.Tensor, retrive_next_token: torch.Tensor, retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:  # fmt: skip
    """Follow the target's argmax down each tree as far as drafts agree with it. SGLang passes these names, so spelt."""
    wanted = target_predict.flatten()
    for row in range(candidates.shape[0]):
        last = int(retrive_index[row, 0])
        accept_index[row, 0] = last
        accepted, current = 0, 0
        for _ in range(1, accept_index.shape[1]):
            current = int(retrive_next_token[row, current])
            while current != -1 and int(candidates[row, current]) != int(wanted[last]):
                current = int(retrive_next_sibling[row, current])
            if current == -1:
                break
            predicts[last] = wanted[last]
            accepted += 1
            last = int(retrive_index[row, current])
            accept_index[row, accepted] = last
        accept_token_num[row] = accepted
        predicts[last] = wanted[last]
