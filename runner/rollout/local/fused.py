"""The decoder layers of known families on a CPU, from their modules' weights, with a handful of kernels per layer.

A decode step of a small model is a few million multiplications: most of its time goes into starting operations and into
threads that wait for each other at the end of each. Here a layer is four matmuls (the experts': torch's own, one per expert)
and five numba kernels, and the batch is split by rows into parts that go through all layers on a thread each. Modules
of other classes, other devices and other cache formats take transformers' own forward (`model.py`): same weights, same
cache interface, and the same tokens up to the order of additions.

Shape legend: N tokens of a part, H hidden, K experts per token, L MoE layers, V vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.precision import cpu_matmul
from runner.rollout.local import cpu_kernels
from runner.rollout.local.attention import LENGTH_BUCKET, KVCache
from runner.rollout.local.experts import EngineExperts, EngineLinear, expert_products
from runner.rollout.local.sampling import SAMPLE, Draws
from runner.rollout.local.weights import Int4Weight, TransientWeight

LAYERS = ("Qwen3MoeDecoderLayer", "Qwen3DecoderLayer")  # transformers' classes that are computed here
ROWS_PER_PART = 16  # fewer are not worth a thread
MAX_PARTS = 4  # an estimate: parts were measured on 2 cores only


def unsupported(decoder: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Why these modules take transformers' own forward; "" when they are computed here."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return f"{device.type} with {dtype}"
    for layer in decoder.layers:
        name = type(layer).__name__
        if name not in LAYERS:
            return f"layers are {name}"
        attention = layer.self_attn
        if attention.head_dim % LENGTH_BUCKET or attention.sliding_window is not None or attention.config.attention_bias:
            return f"attention with heads of {attention.head_dim}, a window or biases"
        if attention.config.hidden_act != "silu" or decoder.rotary_emb.rope_type != "default":
            return f"activation {attention.config.hidden_act} or rotary embedding {decoder.rotary_emb.rope_type}"
    return ""


def share_storage(linears: list[nn.Linear]) -> None:
    """Lay the weights of linear layers with one input above each other, so that one matmul serves them all."""
    with torch.no_grad():
        stacked = torch.cat([linear.weight for linear in linears])
        for linear, rows in zip(linears, stacked.split([linear.out_features for linear in linears]), strict=True):
            linear.weight = nn.Parameter(rows, requires_grad=False)


def stackable(layer: nn.Module) -> list[list[nn.Linear]]:
    """Groups of linear layers of a decoder layer that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    groups: list[list[Any]] = [[attention.q_proj, attention.k_proj, attention.v_proj]]  # type: ignore[union-attr]
    if hasattr(mlp, "gate_proj"):
        groups.append([mlp.gate_proj, mlp.up_proj])  # type: ignore[union-attr]
    return groups


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Shares memory; bf16 as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class _Weights:
    """Where compiled code finds the weights of a product: `arguments` gives (table [pieces, 3], group, stacked) as
    `cpu_kernels.product` and `expert_products` take them.

    Dense and packed INT4 weights are named once and never move.
    """

    def __init__(self, pieces: list[Any], stacked: torch.Tensor | None = None) -> None:
        """pieces: linear layers that read one input, or the resident weights of the experts; dense ones lie in `stacked`."""
        self.pieces: list[Any] = [piece.resident if isinstance(piece, EngineLinear) else piece for piece in pieces]
        self.stacked = stacked
        self.packed = all(isinstance(piece, Int4Weight) for piece in self.pieces)
        self._named: tuple[np.ndarray, int, int] | None = None
        self._handles: list[cpu_kernels.TensorHandle] = []

    @property
    def transient(self) -> bool:
        """Weights that have a matmul of their own, outside compiled code."""
        return not self.packed and any(isinstance(piece, Int4Weight | TransientWeight) for piece in self.pieces)

    def multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [M, in] -> out [M, all outputs], by the pieces' own matmuls."""
        torch.cat([piece(x) if isinstance(piece, nn.Linear) else piece.linear(x) for piece in self.pieces], dim=1, out=out)

    def arguments(self) -> tuple[np.ndarray, int, int]:
        if self._named is None:
            self._named = self._pack() if self.packed else self._dense()
        return self._named

    def _name(self, tensor: torch.Tensor) -> int:
        self._handles.append(cpu_kernels.TensorHandle(tensor))
        return self._handles[-1].address

    def _pack(self) -> tuple[np.ndarray, int, int]:
        rows = [
            (self._name(piece.tensors["integers"]), self._name(piece.tensors["scales"]), sum(piece.rows)) for piece in self.pieces
        ]
        return np.array(rows, np.int64), self._name(torch.tensor([self.pieces[0].group])), 0

    def _dense(self) -> tuple[np.ndarray, int, int]:
        if self.stacked is not None:
            table = [self._row(weight) for weight in self.stacked]
            return np.array(table, np.int64), 0, 0 if table[0][1] else self._name(self.stacked.transpose(1, 2))
        first, rows = self.pieces[0].weight.detach(), sum(piece.out_features for piece in self.pieces)
        whole = first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
        last = self.pieces[-1].weight
        assert last.data_ptr() == whole[rows - len(last) :].data_ptr(), "share_storage comes first"
        return np.array([self._row(whole)], np.int64), 0, 0

    def _row(self, weight: torch.Tensor) -> tuple[int, int, int]:
        """A dense weight [out, in]; with the address of its bits where its products are widened."""
        widened = weight.dtype is torch.bfloat16 and cpu_matmul.widened()
        return self._name(weight.t()), weight.data_ptr() if widened else 0, len(weight)


@dataclass
class _Layer:
    """One decoder layer: arrays that share the parameters' memory, and its products."""

    attention_norm: np.ndarray
    mlp_norm: np.ndarray
    query_norm: np.ndarray
    key_norm: np.ndarray
    qkv: _Weights
    output: _Weights
    gate_up: _Weights
    down: _Weights
    width: int  # of the mlp
    gate: np.ndarray | None  # router [E, H]; None: a dense mlp
    normalize: bool


class _Scratch:
    """Buffers of one part, by name; rows are rounded up to ROW_BLOCK and hold what was there before."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._whole: dict[str, torch.Tensor] = {}
        self._cut: dict[tuple[str, int], tuple[torch.Tensor, np.ndarray]] = {}

    def take(self, name: str, rows: int, columns: int) -> tuple[torch.Tensor, np.ndarray]:
        """The same memory as a tensor and as an array."""
        padded = -(-rows // cpu_kernels.ROW_BLOCK) * cpu_kernels.ROW_BLOCK
        if (name, padded) not in self._cut:
            whole = self._whole.get(name)
            if whole is None or len(whole) < padded:
                whole = self._whole[name] = torch.zeros(padded, columns, dtype=self.dtype)
                self._cut = {key: value for key, value in self._cut.items() if key[0] != name}
            self._cut[name, padded] = whole[:padded], as_array(whole[:padded])
        return self._cut[name, padded]


class FusedDecoder:
    """Embedding, layers, last norm, head and the draw of the next token of an `EngineModel` on a CPU."""

    def __init__(self, decoder: Any, head: nn.Module, dtype: torch.dtype, top_k: int) -> None:
        self.decoder, self.head, self.dtype, self.top_k = decoder, head, dtype, top_k
        self.layers = [_layer(module) for module in decoder.layers]
        config = decoder.config
        self.hidden, self.heads, self.groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = decoder.layers[0].self_attn.head_dim
        self.epsilon = np.float32(config.rms_norm_eps)
        self.scale = np.float32(decoder.layers[0].self_attn.scaling)
        self.moe_layers = sum(layer.gate is not None for layer in self.layers)
        self.embedding = as_array(decoder.embed_tokens.weight)
        self.last_norm = as_array(decoder.norm.weight)
        self.routes = np.zeros((0, 0, 0), dtype=np.int64)  # [L, N, K] of the last forward
        self.splits = not any(  # every part would decode all weights
            weights.transient for layer in self.layers for weights in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        self._scratch: list[_Scratch] = []
        self._no_rows = np.zeros((1, self.hidden), self.embedding.dtype)

    def forward(
        self,
        cache: KVCache,
        rope: tuple[torch.Tensor, torch.Tensor],
        tokens: np.ndarray,
        slot: np.ndarray,
        position: np.ndarray,
        counts: np.ndarray,
        draw: tuple[np.ndarray, np.ndarray] | None,
    ) -> torch.Tensor | Draws:
        """tokens, slot, position [N], sorted by row; counts [B] tokens per row. draw = (temperature, seed) [N]: the next
        token after every token, drawn with the number of its position; None: hidden states [N, H] after the last norm."""
        total = len(tokens)
        caches = [cache.blocked(layer, self.groups, self.head_dim) for layer in range(len(self.layers))]
        angles = as_array(rope[0]).reshape(len(rope[0]), 2, -1), as_array(rope[1]).reshape(len(rope[1]), 2, -1)
        self.routes = np.empty((self.moe_layers, total, self.top_k), dtype=np.int64)
        draws = Draws(np.empty(total, np.int64), np.empty(total, np.float32), np.empty(total, np.float32))
        hidden = torch.empty(0 if draw is not None else total, self.hidden, dtype=self.dtype)
        bounds = self._bounds(counts)
        while len(self._scratch) < len(bounds):
            self._scratch.append(_Scratch(self.dtype))

        def part(number: int) -> None:
            rows = slice(*bounds[number])
            scratch = self._scratch[number]
            normed = self._layers(scratch, caches, angles, tokens[rows], slot[rows], position[rows], self.routes[:, rows])
            count = rows.stop - rows.start
            if draw is None:
                hidden[rows] = normed[:count]
                return
            logits = as_array(self.head(normed))[:count]
            cpu_kernels.draw_rows(
                logits, draw[0][rows], draw[1][rows], position[rows] + 1, SAMPLE,
                draws.picked[rows], draws.tempered[rows], draws.raw[rows],
            )  # fmt: skip

        if len(bounds) == 1:
            part(0)
        else:
            _on_threads(part, len(bounds))
        return hidden if draw is None else draws

    def _bounds(self, counts: np.ndarray) -> list[tuple[int, int]]:
        """Token ranges of the parts; a row is never cut, since its later tokens read what its earlier ones write."""
        ends = np.cumsum(counts)
        total = int(ends[-1])
        parts = min(torch.get_num_threads(), MAX_PARTS, total // ROWS_PER_PART, len(counts)) if self.splits else 1
        if parts <= 1:
            return [(0, total)]
        cuts = ends[np.searchsorted(ends, total * np.arange(1, parts) / parts)].tolist()
        edges = sorted({0, *cuts, total})
        return list(zip(edges[:-1], edges[1:], strict=True))

    def _layers(
        self,
        scratch: _Scratch,
        caches: list[tuple[np.ndarray, np.ndarray]],
        angles: tuple[np.ndarray, np.ndarray],
        tokens: np.ndarray,
        slot: np.ndarray,
        position: np.ndarray,
        routes: np.ndarray,
    ) -> torch.Tensor:
        """Normed hidden states [N rounded up, H] of a part; routes [L, N, K] are written."""
        count, size = len(tokens), self.hidden
        hidden = scratch.take("hidden", count, size)[1][:count]
        np.take(self.embedding, tokens, axis=0, out=hidden)
        normed_t, normed = scratch.take("normed", count, size)
        qkv_t, qkv = scratch.take("qkv", count, (self.heads + 2 * self.groups) * self.head_dim)
        seen_t, seen = scratch.take("seen", count, self.heads * self.head_dim)
        mixed_t, mixed = scratch.take("mixed", count, size)
        one_place, one_share = np.arange(count).reshape(-1, 1), np.ones((count, 1), np.float32)
        added, place, share = self._no_rows, one_place[:, :0], one_share[:, :0]
        moe = 0
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            if layer.qkv.transient or layer.output.transient:
                cpu_kernels.add_norm(hidden, added, place, share, layer.attention_norm, self.epsilon, normed)
                layer.qkv.multiply(normed_t, qkv_t)
                cpu_kernels.attend(
                    qkv.reshape(len(qkv), -1, 2, self.head_dim // 2), layer.query_norm, layer.key_norm, self.epsilon, *angles,
                    slot, position, self.scale, keys, values, seen.reshape(len(seen), self.heads, -1),
                )  # fmt: skip
                layer.output.multiply(seen_t, mixed_t)
                cpu_kernels.add_norm(hidden, mixed, one_place, one_share, layer.mlp_norm, self.epsilon, normed)
            else:
                failed = cpu_kernels.attention_block(
                    hidden, added, place, share, layer.attention_norm, self.epsilon, normed, qkv, *layer.qkv.arguments()[:2],
                    layer.query_norm, layer.key_norm, *angles, slot, position, self.scale, keys, values, seen,
                    *layer.output.arguments()[:2], mixed, layer.mlp_norm,
                )  # fmt: skip
                _check(failed)
            if layer.gate is None:
                place, share = one_place, one_share
                both_t, both = scratch.take("both", count, 2 * layer.width)
                inner_t, inner = scratch.take("inner", count, layer.width)
                added_t, added = scratch.take("added", count, size)
                if layer.gate_up.transient or layer.down.transient:
                    layer.gate_up.multiply(normed_t, both_t)
                    cpu_kernels.gate_activation(both, inner)
                    layer.down.multiply(inner_t, added_t)
                else:
                    up, down = layer.gate_up.arguments(), layer.down.arguments()
                    _check(cpu_kernels.dense_block(normed, *up[:2], both, inner, *down[:2], added))
            else:
                added, place, share = self._experts(scratch, layer, normed, routes[moe])
                moe += 1
        cpu_kernels.add_norm(hidden, added, place, share, self.last_norm, self.epsilon, normed)
        return normed_t

    def _experts(
        self, scratch: _Scratch, layer: _Layer, normed: np.ndarray, index: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows of all experts [P, H], place [N, K], share [N, K]); index [N, K] is written."""
        assert layer.gate is not None
        experts, pairs = len(layer.gate), index.size
        place, share = np.empty(index.shape, np.int64), np.empty(index.shape, np.float32)
        room = cpu_kernels.room_for_experts(pairs, experts)
        rows_t, rows = scratch.take("rows", room, self.hidden)
        both_t, both = scratch.take("both", room, 2 * layer.width)
        inner_t, inner = scratch.take("inner", room, layer.width)
        added_t, added = scratch.take("expert rows", room, self.hidden)
        if not layer.gate_up.transient:
            up, down = layer.gate_up.arguments(), layer.down.arguments()
            _check(
                cpu_kernels.expert_block(
                    normed, layer.gate, layer.normalize, index, share, place, rows, both, inner, added, *up, *down
                )
            )
            return added, place, share
        counts, sizes, first = (np.empty(experts, np.int64) for _ in range(3))
        cpu_kernels.route(normed, layer.gate, layer.normalize, index, share, place, counts)
        cpu_kernels.expert_layout(counts, 0, sizes, first)
        cpu_kernels.spread(normed, index, first, place, rows)
        expert_products(layer.gate_up.pieces, rows_t[:pairs], sizes.tolist(), both_t[:pairs])
        cpu_kernels.gate_activation(both[:pairs], inner[:pairs])
        expert_products(layer.down.pieces, inner_t[:pairs], sizes.tolist(), added_t[:pairs])
        return added, place, share


def _check(failed: int) -> None:
    if failed:
        raise RuntimeError("torch could not compute a matmul of the engine; its message is above")


def _layer(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    experts: EngineExperts | None = getattr(mlp, "experts", None)
    if experts is None:
        gate_up, down = _Weights([mlp.gate_proj, mlp.up_proj]), _Weights([mlp.down_proj])
    else:
        gate_up = _Weights(experts.gate_up, experts.stacked[0])
        down = _Weights(experts.down, experts.stacked[1])
    return _Layer(
        attention_norm=as_array(module.input_layernorm.weight),
        mlp_norm=as_array(module.post_attention_layernorm.weight),
        query_norm=as_array(attention.q_norm.weight).reshape(2, -1),
        key_norm=as_array(attention.k_norm.weight).reshape(2, -1),
        qkv=_Weights([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=_Weights([attention.o_proj]),
        gate_up=gate_up,
        down=down,
        width=mlp.config.intermediate_size if experts is None else experts.down[0].columns,
        gate=as_array(mlp.gate.weight) if experts is not None else None,
        normalize=experts is not None and bool(mlp.gate.norm_topk_prob),
    )


@lru_cache(maxsize=4)
def _workers(parts: int, process: int) -> ThreadPoolExecutor:
    """Threads whose torch operations run on one thread each; one pool per process, for a fork must not inherit threads."""
    before = torch.get_num_threads()
    gate = threading.Barrier(parts)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the process's default: before, not after
        torch.set_num_threads(1)
        gate.wait()

    pool = ThreadPoolExecutor(parts, thread_name_prefix="runner-engine")
    for future in [pool.submit(start) for _ in range(parts)]:
        future.result()
    torch.set_num_threads(before)  # the default of threads to come was set along with the workers' own
    return pool


def _on_threads(part: Callable[[int], None], parts: int) -> None:
    def run(number: int) -> None:
        with torch.inference_mode():
            part(number)

    for future in [_workers(parts, os.getpid()).submit(run, number) for number in range(parts)]:
        future.result()
