"""transformers' modules wired for the engine: attention over slots, resident weights, experts that keep their routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_structure, disk_tensors, named_weights
from runner.models.images import Images, rotary_positions
from runner.models.visual import ImageFeatures, Placed
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.attention import ATTENTION, LENGTH_BUCKET, KVCache, Step
from runner.rollout.local.experts import EngineExperts, EngineLinear
from runner.rollout.local.fused import FusedDecoder, share_storage, stackable, unsupported
from runner.rollout.local.rotary import EVERY, Rotary
from runner.rollout.local.sampling import SAMPLE, Draws, distribution, draws_of, uniforms
from runner.rollout.local.weights import DenseWeight, ResidentWeight, resident_weight

Pieces = tuple[tuple[str, int | None, int, int], ...]  # of runner.models.family.StackedParameter


class EngineModel:
    """A language model whose forward takes a flat token batch and a cache.

    `weights`: HF on-disk name -> the resident weight it is part of (or alone in). `others`: on-disk name -> tensor of
    the model that is copied into (norms, embeddings, biases, routers).
    """

    def __init__(
        self,
        model: ModelConfig,
        plan: PrecisionPlan,
        dtype: torch.dtype,
        device: torch.device,
        weights_from: nn.Module | None = None,
    ) -> None:
        self.config, self.plan, self.dtype, self.device = model, plan, dtype, device
        family = family_of(model)
        self.moe_layers = family.moe_layers(model)
        self.module: nn.Module = weights_from if weights_from is not None else _structure(model, dtype, device)
        self.decoder: Any = self.module.get_decoder()  # type: ignore[operator]
        self.head: Any = self.module.get_output_embeddings()  # type: ignore[operator]
        self.visual: nn.Module | None = self.module.base_model.visual if model.vision else None  # type: ignore[union-attr, assignment]
        self.weights: dict[str, ResidentWeight] = {}
        self.others: dict[str, torch.Tensor] = {}
        self.experts: list[EngineExperts] = []
        self.not_fused = unsupported(self.decoder, dtype, device)
        if not self.not_fused:
            for layer in self.decoder.layers:
                for linears in stackable(layer):
                    share_storage(linears)
        self._install()
        self.fused = None if self.not_fused else FusedDecoder(self.decoder, self.head, dtype, model.experts_top_k)
        self._fused_last = False
        self.rotary = Rotary(self.decoder, dtype, device)

    def _install(self) -> None:
        family, model = family_of(self.config), self.config
        views = dict(disk_tensors(family, model, named_weights(model, self.module)))
        stacks = {stack.name: stack.pieces for stack in family.stacked(model)}
        for name in stacks:
            if name.endswith("gate_up_proj"):
                path = name.rsplit(".", 1)[0]
                self._install_experts(path, stacks[name], stacks[f"{path}.down_proj"], views)
        for name, view in views.items():
            if name in self.weights:
                continue
            tensor_format = self.plan.format_of(name)
            if tensor_format.quantized:
                self._install_linear(name, tensor_format)
            else:
                self.others[name] = view

    def _install_experts(self, path: str, gate_up: Pieces, down: Pieces, views: Mapping[str, torch.Tensor]) -> None:
        old: Any = self.module.get_submodule(path)
        gates, stacked_gate_up = self._make_stack(gate_up, views)
        downs, stacked_down = self._make_stack(down, views)
        biases = (old.gate_up_proj_bias.data, old.down_proj_bias.data) if old.has_bias else None
        experts = EngineExperts(gates, downs, old._apply_gate, (stacked_gate_up, stacked_down), biases)
        self.module.set_submodule(path, experts)
        self.experts.append(experts)

    def _make_stack(self, pieces: Pieces, views: Mapping[str, torch.Tensor]) -> tuple[list[ResidentWeight], torch.Tensor | None]:
        """The weights of all experts in a fused parameter; dense ones are views of one tensor [E, out, in]."""
        names = [tuple(piece[0] for piece in pieces if piece[1] == e) for e in range(self.config.num_experts)]
        stacked = None
        if not any(self.plan.format_of(name).quantized for group in names for name in group):
            stacked = torch.stack([torch.cat([views[name] for name in group]) for group in names])
        return [self._make(group, views, None if stacked is None else stacked[e]) for e, group in enumerate(names)], stacked

    def _make(self, names: tuple[str, ...], views: Mapping[str, torch.Tensor], target: torch.Tensor | None) -> ResidentWeight:
        formats = {self.plan.format_of(name) for name in names}
        if len(formats) > 1:
            raise UserError(f"{' and '.join(names)} have different formats, the engine computes them as one")
        rows = tuple(views[name].shape[0] for name in names)
        columns = views[names[0]].shape[1]
        if target is not None:
            weight: ResidentWeight = DenseWeight(names, rows, columns, self.dtype, self.device, target)
        else:
            weight = resident_weight(names, rows, columns, formats.pop(), self.dtype, self.device)
        self.weights.update(dict.fromkeys(names, weight))
        return weight

    def _install_linear(self, name: str, tensor_format: TensorFormat) -> None:
        path = name.removesuffix(".weight")
        linear = self.module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        weight = resident_weight((name,), (linear.out_features,), linear.in_features, tensor_format, self.dtype, self.device)
        self.module.set_submodule(path, EngineLinear(weight, linear.bias))
        self.weights[name] = weight
        if linear.bias is not None:
            self.others[f"{path}.bias"] = linear.bias.data

    def rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [length, d] of all positions, for the CPU kernels."""
        angles = self.rotary.table(max(length, self.config.max_context_tokens))
        assert isinstance(angles, tuple)
        return angles

    def forward(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        slots: np.ndarray | None = None,
        images: np.ndarray | None = None,
        placed: Placed | None = None,
    ) -> torch.Tensor:
        """Hidden states [N, H] after the last norm of new tokens; writes their keys and values.

        tokens [N] int64, sorted by row; row r (in slot slots[r], ascending; None: slot r) has counts[r] new tokens (at
        least 1), the first of them at position starts[r]. Vision models: images [B, I, 3] are the extents of the rows' images
        (None: no row has any), placed the features of those of their tokens that are new.
        """
        rows, width = len(counts), int(counts.max())
        row, column = rows_and_columns(counts)
        positions_np = starts[row] + column
        self._fused_last = self.computes_fused(cache)
        if self._fused_last:
            assert self.fused is not None
            slot = row if slots is None else slots[row]
            hidden = self.fused.forward(cache, self.rope(cache.length), tokens, slot, positions_np, counts, None)
            assert isinstance(hidden, torch.Tensor)
            return hidden
        uniform = len(tokens) == rows * width
        limit = np.minimum(starts[:, None] + np.arange(width)[None, :], (starts + counts - 1)[:, None])
        reads = min(-(-int(positions_np.max() + 1) // LENGTH_BUCKET) * LENGTH_BUCKET, cache.length)
        to = self._to_device
        if slots is None:
            slots = np.arange(rows)
        neighbours = int(slots[-1]) - int(slots[0]) == rows - 1
        step = Step(
            cache=cache,
            slots=slice(int(slots[0]), int(slots[-1]) + 1) if neighbours else to(slots),
            rows=rows,
            width=width,
            write_index=to(np.stack([slots[row], positions_np])),
            pad_index=None if uniform else to(row * width + column),
            limit=to(limit),
            reads=reads,
        )
        positions = to(positions_np)
        length = max(cache.length, self.config.max_context_tokens)
        rope = self.rotary.at(positions, length) if images is None else {EVERY: self._image_angles(positions_np, images[row])}
        hidden = self.decoder.embed_tokens(to(tokens).unsqueeze(1))
        if placed is not None:
            hidden = hidden.index_copy(0, placed.where, placed.embeds.unsqueeze(1))
        for number, layer in enumerate(self.decoder.layers[: self.config.num_layers]):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions.unsqueeze(1),
                past_key_values=None,
                use_cache=False,
                position_embeddings=rope[self.rotary.kinds[number]],
                engine_step=step,
            )
            if placed is not None and number < len(placed.deepstack):
                hidden = hidden.index_add(0, placed.where, placed.deepstack[number].unsqueeze(1))
        return self.decoder.norm(hidden).squeeze(1)

    def _image_angles(self, positions: np.ndarray, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [N, 1, d] of tokens at these positions [N] of sequences with these images [N, I, 3]."""
        cos, sin = self.rotary.compute(self._to_device(rotary_positions(positions, images)).unsqueeze(1))
        return cos.transpose(0, 1), sin.transpose(0, 1)

    def encode(self, images: Sequence[Images]) -> ImageFeatures | None:
        """The visual tower's features of these rows' images; None where no row has any."""
        if not any(images):
            return None
        if self.visual is None:
            raise UserError(f"{self.config.name} has no visual tower", key="model", fix="model=tiny_vlm")
        return ImageFeatures(self.visual, images)

    def computes_fused(self, cache: KVCache) -> bool:
        """Whether a forward over this cache goes through the CPU kernels (a cache of another dtype does not)."""
        return self.fused is not None and cache.dtype == self.dtype

    def draws(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        sampling: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        images: np.ndarray | None = None,
    ) -> Draws:
        """The next token after each of the new tokens (see `forward`), drawn with the number of its position.

        sampling: temperature, top_p, top_k and seed of every row [B].
        """
        row, column = rows_and_columns(counts)
        temperature, top_p, top_k, seed = (values[row] for values in sampling)
        position = starts[row] + column
        if self.computes_fused(cache) and not (top_k > 0).any() and not (top_p < 1.0).any():
            assert self.fused is not None
            self._fused_last = True
            rope = self.rope(cache.length)
            drawn = self.fused.forward(cache, rope, tokens, row, position, counts, (temperature, seed))
            assert isinstance(drawn, Draws)
            return drawn
        logits = self.logits(self.forward(cache, tokens, starts, counts, images=images))
        return draws_of(distribution(logits, temperature, top_p, top_k), uniforms(seed, position + 1, SAMPLE))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> fp32 [N, vocab]."""
        return self.head(hidden).float()

    def routes(self) -> torch.Tensor | None:
        """[N, L, K] experts of the last forward, MoE layers in order; None for dense models."""
        if not self.experts:
            return None
        if self._fused_last:
            assert self.fused is not None
            return torch.from_numpy(self.fused.routes.transpose(1, 0, 2))
        return torch.stack([experts.chosen for experts in self.experts if experts.chosen is not None], 1)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def rows_and_columns(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and place within the row of every token, for rows of counts [B] tokens that lie one after the other."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)


def _structure(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The modules without weights: the first weight sync brings them."""
    built = build_structure(model, dtype=dtype, device=device, attention=ATTENTION, experts="eager")
    if model.vision:  # a visual tower attends within an image, without a cache
        built.set_attn_implementation({"vision_config": "sdpa"})
    return built
