"""Qwen3-VL, dense: a Qwen3 decoder behind a visual tower with deepstack mergers.

ModelConfig has no numbers of a visual tower. A checkpoint's are those of its config.json; those of a tiny model without a
checkpoint follow the decoder's width (`tower`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config.schema import ModelConfig, Role
from runner.errors import UserError
from runner.models import common
from runner.models.agreement import local_config
from runner.models.family import Parameter, VisualTower
from runner.models.vocabulary import IMAGE_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID

# what transformers takes for the decoder where config.json has nothing
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}


def tower(model: ModelConfig) -> VisualTower:
    """The tower of a checkpoint, or the toy one. A hub id that is not on this machine yet counts as transformers' default tower
    until it is loaded."""
    if model.hf_checkpoint is None:
        return VisualTower(hidden_size=model.hidden_size, ffn_size=model.ffn_size, num_heads=model.num_heads)
    config = local_config(model) or {}
    vision = config.get("vision_config")
    try:
        return read_tower(vision if isinstance(vision, dict) else {}, model.hf_checkpoint)
    except ValueError as error:
        raise UserError(str(error), key="model.hf_checkpoint", fix="a checkpoint whose visual tower has a usual shape") from None


def read_tower(vision: dict[str, Any], name: str) -> VisualTower:
    """From `vision_config`; what is left out has transformers' value. ValueError naming what is not understood."""
    reader = common.ConfigReader(vision, f"{name} (vision_config)")
    reader.must_be("hidden_act", "gelu_pytorch_tanh", absent="gelu_pytorch_tanh")
    reader.must_be("in_channels", 3, absent=3)
    numbers = {key: reader.optional_whole(key, absent, low=1, high=1 << 20) for key, absent in TOWER_KEYS.items()}
    deepstack = reader.optional("deepstack_visual_indexes", [8, 16, 24])
    layers = range(numbers["depth"])
    if not isinstance(deepstack, list) or any(index not in layers for index in deepstack):
        raise ValueError(
            f"config.json of {name}: `deepstack_visual_indexes` is {common.short(deepstack)}, not of {len(layers)} layers"
        )
    return VisualTower(
        hidden_size=numbers["hidden_size"],
        ffn_size=numbers["intermediate_size"],
        num_heads=numbers["num_heads"],
        depth=numbers["depth"],
        patch_size=numbers["patch_size"],
        temporal_patch_size=numbers["temporal_patch_size"],
        merge=numbers["spatial_merge_size"],
        num_positions=numbers["num_position_embeddings"],
        deepstack_layers=tuple(deepstack),
    )


TOWER_KEYS = {  # of vision_config, with transformers' values for what is left out
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "depth": 27,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
}


class Qwen3VL(common.DenseFamily):
    name = "qwen3_vl"
    architectures: tuple[str, ...] = ("Qwen3VLForConditionalGeneration",)
    model_types: tuple[str, ...] = ("qwen3_vl",)
    sees: bool = True

    def parameters(self, model: ModelConfig) -> Iterator[Parameter]:
        yield from _visual_parameters(model)
        decoder = "model.language_model."
        yield common.embedding(model, decoder)
        for layer in range(model.num_layers):
            prefix = f"{decoder}layers.{layer}"
            yield from common.grouped_query_attention(model, prefix, layer, output_bias=True)
            yield from common.gated_mlp(f"{prefix}.mlp", model.hidden_size, model.ffn_size, Role.dense_mlp, layer)
            yield from common.layer_norms(model, prefix, layer)
        yield from common.final_norm_and_head(model, decoder)

    def tower(self, model: ModelConfig) -> VisualTower | None:
        return tower(model)

    def processor_config(self, model: ModelConfig) -> dict[str, Any]:
        shape = tower(model)
        side = shape.side
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": shape.patch_size,
            "temporal_patch_size": shape.temporal_patch_size,
            "merge_size": shape.merge,
            "image_mean": [shape.mean] * shape.channels,
            "image_std": [shape.std] * shape.channels,
            "size": {"shortest_edge": side**2, "longest_edge": side**2 * model.max_context_tokens},  # pixels of a whole image
        }

    def hf_config(self, model: ModelConfig) -> dict[str, Any]:
        text = common.base_config(model) | {"model_type": "qwen3_vl_text", "head_dim": model.head_dim}
        # the three parts (time, height, width) of the rotary position share the pairs of a head
        pairs = model.head_dim // 2
        sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": sections, "mrope_interleaved": True}
        shape = tower(model)
        vision = {
            "model_type": "qwen3_vl_vision",
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_size,
            "num_heads": shape.num_heads,
            "depth": shape.depth,
            "patch_size": shape.patch_size,
            "temporal_patch_size": shape.temporal_patch_size,
            "in_channels": shape.channels,
            "spatial_merge_size": shape.merge,
            "num_position_embeddings": shape.num_positions,
            "out_hidden_size": model.hidden_size,
            "deepstack_visual_indexes": list(shape.deepstack_layers),
            "initializer_range": model.initializer_range,
        }
        return {
            "model_type": "qwen3_vl",
            "architectures": list(self.architectures),
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": model.tied_embeddings,
            "image_token_id": IMAGE_ID,
            "video_token_id": VIDEO_ID,
            "vision_start_token_id": VISION_START_ID,
            "vision_end_token_id": VISION_END_ID,
        }

    def from_hf_config(self, config: dict[str, Any], name: str) -> dict[str, Any]:
        whole = common.ConfigReader(config, name, DEFAULTS)
        reader, visual = whole.part("text_config"), whole.part("vision_config")
        reader.must_be("hidden_act", "silu", absent="silu")
        fields = common.plain_fields(reader, self.name, qk_norm=True, head_dim=reader.whole("head_dim"))
        fields |= {"vision": True, "tied_embeddings": whole.flag("tie_word_embeddings", False)}
        read = read_tower(visual.config, name)
        visual.must_be("out_hidden_size", fields["hidden_size"], absent=3584)
        if len(read.deepstack_layers) > fields["num_layers"]:
            count = len(read.deepstack_layers)
            raise ValueError(f"config.json of {name}: {count} deepstack layers for {fields['num_layers']} layers")
        return fields


def _visual_parameters(model: ModelConfig) -> Iterator[Parameter]:
    shape = tower(model)
    hidden, merged = shape.hidden_size, shape.hidden_size * shape.merge**2

    def weight_and_bias(name: str, *dimensions: int) -> Iterator[Parameter]:
        yield Parameter(f"model.visual.{name}.weight", Role.vision, dimensions)
        yield Parameter(f"model.visual.{name}.bias", Role.vision, dimensions[:1])

    def merger(name: str, norm_size: int) -> Iterator[Parameter]:
        yield from weight_and_bias(f"{name}.norm", norm_size)
        yield from weight_and_bias(f"{name}.linear_fc1", merged, merged)
        yield from weight_and_bias(f"{name}.linear_fc2", model.hidden_size, merged)

    patch = (shape.channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield from weight_and_bias("patch_embed.proj", hidden, *patch)
    yield Parameter("model.visual.pos_embed.weight", Role.vision, (shape.num_positions, hidden))
    for block in range(shape.depth):
        prefix = f"blocks.{block}"
        yield from weight_and_bias(f"{prefix}.norm1", hidden)
        yield from weight_and_bias(f"{prefix}.norm2", hidden)
        yield from weight_and_bias(f"{prefix}.attn.qkv", 3 * hidden, hidden)
        yield from weight_and_bias(f"{prefix}.attn.proj", hidden, hidden)
        yield from weight_and_bias(f"{prefix}.mlp.linear_fc1", shape.ffn_size, hidden)
        yield from weight_and_bias(f"{prefix}.mlp.linear_fc2", hidden, shape.ffn_size)
    yield from merger("merger", hidden)
    for index in range(len(shape.deepstack_layers)):
        yield from merger(f"deepstack_merger_list.{index}", merged)


FAMILY = Qwen3VL()
