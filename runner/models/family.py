"""The table of a model family: every parameter's HF on-disk name, role and shape, computed from config numbers.

Torch-free, so that rules, the planner and the precision plan read the same table before anything starts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from runner.config.schema import ModelConfig, Role


class Cut(Enum):
    """What each of the ranks that share a weight holds of it, in Megatron-core and in SGLang alike.

    Tensor-parallel ranks share it; a routed expert lies whole on one expert-parallel rank, or is shared by its etp ranks.
    """

    whole = "whole"  # every rank has all of it
    outputs = "outputs"  # rows of [out, in], entries of its bias; a vocabulary may be padded
    kv_heads = "kv_heads"  # likewise, but never finer than one key/value head: more ranks hold copies
    inputs = "inputs"  # columns of [out, in]: groups of a quantized weight lie along them


@dataclass(frozen=True)
class InStack:
    """A tensor of a checkpoint folder with a matrix or a bias of every expert: the weight is rows first, first + step, ... of
    stack[expert]. How the stack lies there, runner/models/stacks.py says."""

    name: str  # "model.layers.0.mlp.experts.gate_up_proj"
    experts: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Parameter:
    """One weight as it lies in an HF checkpoint (experts one by one).

    `cut` says how ranks share it.
    `fused` names the matrix that engines lay it into together with other weights: they want one NVFP4 global scale for it.
    `stack`: the tensor of all experts that published checkpoints of its family hold it in.
    """

    name: str  # "model.layers.0.mlp.experts.3.gate_proj.weight"
    role: Role
    shape: tuple[int, ...]  # [out, in] for matrices
    layer: int | None = None
    expert: int | None = None
    fused: str | None = None  # "model.layers.0.mlp.experts.3.gate_up_proj"
    cut: Cut = Cut.whole
    stack: InStack | None = None


@dataclass(frozen=True)
class StackedParameter:
    """A parameter that transformers fuses in memory, and the on-disk weights in it.

    `pieces`: (on-disk name, expert index, first row, last row + 1): disk weight == memory[expert, start:stop]. Expert None: the
    whole parameter under another name.
    """

    name: str  # "model.layers.0.mlp.experts.gate_up_proj"
    pieces: tuple[tuple[str, int | None, int, int], ...]


class MtpLayers(Protocol):
    """A family's multi-token-prediction layers as modules. Called with hidden states and the next tokens' embeddings, both
    [B, T, H], and position embeddings, a layer gives the states [B, T, H] whose lm_head logits predict one token further."""

    prefix: str  # of their parameters, on disk and in memory: "model.mtp_layers."; then <layer>.<name>

    def build(self, config: Any) -> tuple[list[Any], Any]:
        """(layers with weights still to be filled, their rotary embedding) of transformers' config, without the rest of the
        model."""
        ...


@dataclass(frozen=True)
class VisualTower:
    """Sizes of the visual tower; images are cut into patches of `patch_size` pixels, `merge` x `merge` patches per token."""

    hidden_size: int
    ffn_size: int
    num_heads: int
    depth: int = 2
    patch_size: int = 4
    temporal_patch_size: int = 2
    channels: int = 3
    merge: int = 2
    num_positions: int = 256  # a 16 x 16 grid, interpolated for other image sizes
    mean: float = 0.5  # of every channel, after rescaling to [0, 1]
    std: float = 0.5
    marks: int = 2  # tokens around those of an image: start and end of vision
    deepstack_layers: tuple[int, ...] = (0,)  # tower layers whose output is added to the first decoder layers

    @property
    def side(self) -> int:
        """Pixels on each side of what one image token stands for."""
        return self.patch_size * self.merge


class Family(Protocol):
    name: str
    architectures: tuple[str, ...]  # config.json "architectures" that this family reads
    model_types: tuple[str, ...]  # config.json "model_type"s of them; the first is transformers' own
    rotary_share: float  # of a head that is rotated
    normalizes_top_k: bool  # the chosen experts' weights sum to one
    gates_shared_expert: bool  # the shared expert has a sigmoid gate
    groups_experts: bool  # the router may choose groups of experts first
    sees: bool  # it has a visual tower

    @property
    def mtp(self) -> MtpLayers | None:
        """None: the family has none that anything here computes."""
        ...

    def register(self) -> None:
        """Let transformers build this architecture, where it does not know it by itself. Safe to call again."""
        ...

    def adapt(self, built: Any) -> None:
        """Give a model that transformers built modules of this family's own, in place of those whose weights lie otherwise in
        memory than trainers and engines here compute with."""
        ...

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        """Every parameter, in checkpoint order; tied lm_head is left out."""
        ...

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        """The parameters of transformers that are fused, or named otherwise, in memory; the rest has its disk name there."""
        ...

    def moe_layers(self, model: ModelConfig) -> list[int]:
        """Global ids of the layers with routed experts, ascending."""
        ...

    def routers(self, model: ModelConfig) -> list[str]:
        """transformers' modules that return (logits, weights, experts) of the layers with routed experts, ascending."""
        ...

    def unused(self, model: ModelConfig, names: Collection[str]) -> set[str]:
        """Those of a folder's tensors that belong to a part that published checkpoints have and nothing here computes: they are
        left out, where any other tensor that the table does not have is an error."""
        ...

    def window(self, config: dict[str, Any]) -> int | None:
        """Tokens that some layer of this config.json sees at most, itself included; None: every layer sees everything."""
        ...

    def tower(self, model: ModelConfig) -> VisualTower | None:
        """The visual tower of a checkpoint, or of a tiny model without one; None where the family has none. UserError for a
        checkpoint's that is not understood."""
        ...

    def processor_config(self, model: ModelConfig) -> dict[str, Any]:
        """preprocessor_config.json of a family that sees: how transformers makes the patches of runner/models/images.py."""
        ...

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of this architecture, for transformers' AutoConfig.for_model(**d) and for engines."""
        ...

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        """The ModelConfig fields read off a config.json; raises ValueError naming what is not understood."""
        ...
