"""Parts of parameter tables that several families share, and the reading of config.json fields. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from runner.config.choices import RouterScore
from runner.config.schema import ModelConfig, Role
from runner.models.family import Cut, MtpLayers, Parameter, StackedParameter, VisualTower
from runner.models.vocabulary import EOS_ID, PAD_ID

# ModelConfig fields of a dense model without MLA, MTP or vision
PLAIN: dict[str, Any] = {
    "num_experts": 0,
    "experts_top_k": 0,
    "expert_ffn_size": 0,
    "num_shared_experts": 0,
    "num_dense_layers": 0,
    "router_score": RouterScore.softmax,
    "router_bias": False,
    "routed_scaling_factor": 1.0,
    "expert_groups": 1,
    "expert_groups_top_k": 1,
    "q_lora_rank": 0,
    "kv_lora_rank": 0,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "v_head_dim": 0,
    "num_mtp_layers": 0,
    "vision": False,
}


MAX_WIDTH = 1 << 24  # of any size in a config.json: far beyond every model, and no table of parameters is too long for it
MAX_LAYERS = 1_000
MAX_EXPERTS = 10_000
MAX_CONTEXT = 1 << 40
MAX_NUMBER = 1e30
# what transformers takes where config.json has nothing; families have others beside these
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


class KnownFamily:
    """What is so of most families: transformers has them, and they bring nothing beside their decoder."""

    mtp: MtpLayers | None = None
    rotary_share: float = 1.0
    normalizes_top_k: bool = True
    gates_shared_expert: bool = False
    groups_experts: bool = False
    sees: bool = False

    def register(self) -> None:
        return

    def adapt(self, built: Any) -> None:
        return

    def unused(self, model: ModelConfig, names: Collection[str]) -> set[str]:
        return set()

    def tower(self, model: ModelConfig) -> VisualTower | None:
        return None

    def processor_config(self, model: ModelConfig) -> dict[str, Any]:
        raise AssertionError(f"{model.family} sees no images")

    def window(self, config: dict[str, Any]) -> int | None:
        return None


class DenseFamily(KnownFamily):
    """A family without experts: nothing is fused in memory."""

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        yield from ()

    def moe_layers(self, model: ModelConfig) -> list[int]:
        return []

    def routers(self, model: ModelConfig) -> list[str]:
        return []


class SparseFamily(KnownFamily):
    """A family whose layers after the first `num_dense_layers` have routed experts under `mlp`."""

    def stacked(self, model: ModelConfig) -> Iterator[StackedParameter]:
        for layer in self.moe_layers(model):
            yield from stacked_experts(model, f"model.layers.{layer}.mlp")

    def moe_layers(self, model: ModelConfig) -> list[int]:
        return list(range(model.num_dense_layers, model.num_layers))

    def routers(self, model: ModelConfig) -> list[str]:
        return [f"model.layers.{layer}.mlp.gate" for layer in self.moe_layers(model)]


def embedding(model: ModelConfig, prefix: str = "model.") -> Parameter:
    return Parameter(f"{prefix}embed_tokens.weight", Role.embedding, (model.vocab_size, model.hidden_size), cut=Cut.outputs)


def final_norm_and_head(model: ModelConfig, prefix: str = "model.") -> Iterator[Parameter]:
    """The last norm, and lm_head unless it is tied to the embedding (then it is not on disk)."""
    yield Parameter(f"{prefix}norm.weight", Role.norm, (model.hidden_size,))
    if not model.tied_embeddings:
        yield Parameter("lm_head.weight", Role.lm_head, (model.vocab_size, model.hidden_size), cut=Cut.outputs)


def layer_norms(model: ModelConfig, prefix: str, layer: int | None) -> Iterator[Parameter]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Parameter(f"{prefix}.{norm}.weight", Role.norm, (model.hidden_size,), layer)


def grouped_query_attention(model: ModelConfig, prefix: str, layer: int | None, *, output_bias: bool) -> Iterator[Parameter]:
    """q, k, v, o projections of Qwen-style attention. `prefix` ends in the layer, without a dot.

    `attention_bias` gives q, k, v a bias; `output_bias` says whether o_proj has one too (Qwen3 yes, Qwen2 no).
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections = {
        "q_proj": ((queries, model.hidden_size), Cut.outputs),
        "k_proj": ((keys, model.hidden_size), Cut.kv_heads),
        "v_proj": ((keys, model.hidden_size), Cut.kv_heads),
        "o_proj": ((model.hidden_size, queries), Cut.inputs),
    }
    for projection, (shape, cut) in projections.items():
        name = f"{prefix}.self_attn.{projection}"
        fused = None if projection == "o_proj" else f"{prefix}.self_attn.qkv_proj"
        yield Parameter(f"{name}.weight", Role.attention, shape, layer, fused=fused, cut=cut)
        if model.attention_bias and (projection != "o_proj" or output_bias):
            yield Parameter(f"{name}.bias", Role.attention, shape[:1], layer, cut=of_bias(cut))
    if model.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield Parameter(f"{prefix}.self_attn.{norm}.weight", Role.norm, (model.head_dim,), layer)


def of_bias(cut: Cut) -> Cut:
    """How the bias of a weight is shared: where ranks have part of the inputs, each adds to all outputs."""
    return Cut.whole if cut is Cut.inputs else cut


def gated_mlp(
    prefix: str, hidden: int, ffn: int, role: Role, layer: int | None, expert: int | None = None
) -> Iterator[Parameter]:
    """gate_proj, up_proj `[ffn, hidden]` and down_proj `[hidden, ffn]` under `prefix` (without a dot at its end)."""
    for projection in ("gate_proj", "up_proj"):
        fused = f"{prefix}.gate_up_proj"
        yield Parameter(f"{prefix}.{projection}.weight", role, (ffn, hidden), layer, expert, fused, Cut.outputs)
    yield Parameter(f"{prefix}.down_proj.weight", role, (hidden, ffn), layer, expert, cut=Cut.inputs)


def dense_decoder(model: ModelConfig, *, output_bias: bool) -> Iterator[Parameter]:
    """Every parameter of a decoder of grouped-query attention and gated mlps."""
    yield embedding(model)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        yield from grouped_query_attention(model, prefix, layer, output_bias=output_bias)
        yield from gated_mlp(f"{prefix}.mlp", model.hidden_size, model.ffn_size, Role.dense_mlp, layer)
        yield from layer_norms(model, prefix, layer)
    yield from final_norm_and_head(model)


def dense_or_shared_and_routed(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    """DeepSeek-V3's mlp: dense in the first layers, then experts and shared experts in one mlp; `prefix` ends in `mlp`."""
    hidden = model.hidden_size
    if layer < model.num_dense_layers:
        yield from gated_mlp(prefix, hidden, model.ffn_size, Role.dense_mlp, layer)
        return
    yield from routed_experts(model, prefix, layer)
    if model.num_shared_experts:
        shared = model.num_shared_experts * model.expert_ffn_size
        yield from gated_mlp(f"{prefix}.shared_experts", hidden, shared, Role.shared_expert, layer)


def drafting_layers(model: ModelConfig, names: Collection[str]) -> set[str]:
    """Of stored tensors those of multi-token-prediction layers, as DeepSeek-V3 and GLM-4.5 have them: behind the model's last
    layer, with a projection of two states; a layer without one is a decoder layer of a longer model."""
    layers = [(name, match) for name in names if (match := re.match(r"model\.layers\.(\d+)\.(.*)", name))]
    drafting = {match[1] for _, match in layers if match[2].startswith("eh_proj.") and int(match[1]) >= model.num_layers}
    return {name for name, match in layers if match[1] in drafting}


def routed_experts(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    """The router and every expert of one MoE layer; `prefix` ends in `mlp`."""
    yield Parameter(f"{prefix}.gate.weight", Role.router, (model.num_experts, model.hidden_size), layer)
    if model.router_bias:
        yield Parameter(f"{prefix}.gate.e_score_correction_bias", Role.router, (model.num_experts,), layer)
    for expert in range(model.num_experts):
        name = f"{prefix}.experts.{expert}"
        yield from gated_mlp(name, model.hidden_size, model.expert_ffn_size, Role.routed_expert, layer, expert)


def stacked_experts(model: ModelConfig, prefix: str) -> Iterator[StackedParameter]:
    """transformers' fused tensors: gate_up_proj `[E, 2 * ffn, hidden]` (gate rows first), down_proj `[E, hidden, ffn]`."""
    ffn, hidden = model.expert_ffn_size, model.hidden_size
    gate_up: list[tuple[str, int, int, int]] = []
    down: list[tuple[str, int, int, int]] = []
    for expert in range(model.num_experts):
        name = f"{prefix}.experts.{expert}"
        gate_up.append((f"{name}.gate_proj.weight", expert, 0, ffn))
        gate_up.append((f"{name}.up_proj.weight", expert, ffn, 2 * ffn))
        down.append((f"{name}.down_proj.weight", expert, 0, hidden))
    yield StackedParameter(f"{prefix}.experts.gate_up_proj", tuple(gate_up))
    yield StackedParameter(f"{prefix}.experts.down_proj", tuple(down))


def block_sparse_experts(model: ModelConfig, prefix: str, layer: int) -> Iterator[Parameter]:
    """Router and experts of one MoE layer as Mixtral names them: w1 is gate, w3 up, w2 down; `prefix` ends in the layer."""
    ffn, hidden, block = model.expert_ffn_size, model.hidden_size, f"{prefix}.block_sparse_moe"
    yield Parameter(f"{block}.gate.weight", Role.router, (model.num_experts, hidden), layer)
    for expert in range(model.num_experts):
        name = f"{block}.experts.{expert}"
        for projection in ("w1", "w3"):
            weight = f"{name}.{projection}.weight"
            yield Parameter(weight, Role.routed_expert, (ffn, hidden), layer, expert, f"{name}.w13", Cut.outputs)
        yield Parameter(f"{name}.w2.weight", Role.routed_expert, (hidden, ffn), layer, expert, cut=Cut.inputs)


def stacked_block_sparse(model: ModelConfig, prefix: str) -> Iterator[StackedParameter]:
    """The same in memory, where transformers has them under `mlp` as those of every other family."""
    ffn, hidden = model.expert_ffn_size, model.hidden_size
    gate_up: list[tuple[str, int | None, int, int]] = []
    down: list[tuple[str, int | None, int, int]] = []
    for expert in range(model.num_experts):
        name = f"{prefix}.block_sparse_moe.experts.{expert}"
        gate_up += [(f"{name}.w1.weight", expert, 0, ffn), (f"{name}.w3.weight", expert, ffn, 2 * ffn)]
        down.append((f"{name}.w2.weight", expert, 0, hidden))
    whole = ((f"{prefix}.block_sparse_moe.gate.weight", None, 0, model.num_experts),)
    yield StackedParameter(f"{prefix}.mlp.gate.weight", whole)
    yield StackedParameter(f"{prefix}.mlp.experts.gate_up_proj", tuple(gate_up))
    yield StackedParameter(f"{prefix}.mlp.experts.down_proj", tuple(down))


def base_config(model: ModelConfig) -> dict[str, Any]:
    """config.json fields that every family writes.

    `rope_theta` is written in the old place and in the new one (`rope_parameters`), because engines differ in which they read.
    A model without a checkpoint uses the tokenizer of runner/models/vocabulary.py, so its special token ids are known.
    """
    config: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_context_tokens,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "use_cache": True,
    }
    if model.hf_checkpoint is None:
        config |= {"pad_token_id": PAD_ID, "bos_token_id": None, "eos_token_id": EOS_ID}
    return config


class ConfigReader:
    """Reads fields of a config.json that somebody else made; ValueError names the one that is missing or not understood.

    `defaults`: what transformers takes for a field that is absent or null. Only fields that no weight's shape depends on have
    one: a size that is missing is refused by its name, before weights of another size are called missing.
    """

    def __init__(self, config: dict[str, Any], name: str, defaults: dict[str, Any] | None = None) -> None:
        self.config = config
        self.name = name
        self.defaults = DEFAULTS | (defaults or {})

    def get(self, *keys: str) -> Any:
        """The first of `keys` that is there and not null, or the default; ValueError when there is neither."""
        for key in keys:
            if self.config.get(key) is not None:
                return self.config[key]
        for key in keys:
            if key in self.defaults:
                return self.defaults[key]
        found = "null as" if any(key in self.config for key in keys) else "no"
        raise ValueError(f"config.json of {self.name} has {found} `{keys[0]}`")

    def optional(self, key: str, absent: Any) -> Any:
        """A field that published configs leave out when it has this value; null counts as absent."""
        value = self.config.get(key)
        return absent if value is None else value

    def whole(self, *keys: str, low: int = 1, high: int = MAX_WIDTH) -> int:
        """A whole number from `low` to `high`."""
        return self._whole(self.get(*keys), keys[0], low, high)

    def optional_whole(self, key: str, absent: int, *, low: int = 0, high: int = MAX_WIDTH) -> int:
        return self._whole(self.optional(key, absent), key, low, high)

    def _whole(self, value: Any, key: str, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            allowed = f"a whole number, {low} to {high}"
            raise ValueError(f"config.json of {self.name}: `{key}` is {short(repr(value))}; it must be {allowed}")
        return value

    def number(self, *keys: str) -> float:
        """A positive, finite number."""
        return self._number(self.get(*keys), keys[0])

    def _number(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise ValueError(f"config.json of {self.name}: `{key}` is {short(repr(value))}; it must be a positive number")
        return float(value)

    def flag(self, key: str, absent: bool) -> bool:
        value = self.optional(key, absent)
        if not isinstance(value, bool):
            raise ValueError(f"config.json of {self.name}: `{key}` is {short(repr(value))}; it must be true or false")
        return value

    def part(self, key: str) -> ConfigReader:
        """A reader of the object under `key`."""
        value = self.config.get(key)
        if not isinstance(value, dict):
            found = "no" if value is None else "no object as"
            raise ValueError(f"config.json of {self.name} has {found} `{key}`")
        return ConfigReader(value, self.name, self.defaults)

    def must_be(self, key: str, expected: Any, *, absent: Any) -> None:
        """ValueError unless the field has the one value that this family's table describes."""
        value = self.optional(key, absent)
        if value != expected:
            raise ValueError(
                f"config.json of {self.name}: `{key}` is {short(repr(value))}; this family understands {expected!r} only"
            )

    def rope_theta(self) -> float:
        """As transformers 5: `rope_scaling` or else `rope_parameters`, then the top level, then the default."""
        for key in ("rope_scaling", "rope_parameters"):
            parameters = self.config.get(key)
            if not parameters:
                continue
            if not isinstance(parameters, dict):
                raise ValueError(f"config.json of {self.name}: `{key}` is {short(repr(parameters))}; it must be an object")
            parameters = of_full_attention(parameters)
            if "rope_theta" in parameters:
                return self._number(parameters["rope_theta"], f"{key}.rope_theta")
            break
        return self.number("rope_theta")


def short(value: object) -> str:
    """A value of somebody else's file for a message: one short line. Texts stay without quotes."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def of_full_attention(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters of layers that see everything, where kinds of layers have their own (Gemma 3); or all there are."""
    own = rope.get("full_attention")
    return own if isinstance(own, dict) else rope


def full_attention(reader: ConfigReader) -> None:
    """ValueError for a config.json of Qwen2's kind some of whose layers see a window only."""
    reader.must_be("use_sliding_window", False, absent=False)


def qwen_window(config: dict[str, Any]) -> int | None:
    """`sliding_window` of a config.json of Qwen2's kind, where it is used at all."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


def checked_window(reader: ConfigReader, window: Any) -> int | None:
    """The window; ValueError for one that is none."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"config.json of {reader.name}: `sliding_window` is {short(repr(window))}; it must be a whole number")
    return window


def first_layers(reader: ConfigReader, key: str) -> int:
    """The number of layers that a list of layers names; ValueError unless they are the first."""
    layers = reader.optional(key, [])
    if not isinstance(layers, list) or layers != list(range(len(layers))):
        raise ValueError(f"config.json of {reader.name}: `{key}` is {layers!r:.80}; only the first layers may be dense")
    return len(layers)


def even_heads(reader: ConfigReader) -> int:
    """The width of a head where config.json does not say: the model's width, shared out evenly."""
    return reader.whole("hidden_size") // reader.whole("num_attention_heads")


def plain_fields(reader: ConfigReader, family: str, *, qk_norm: bool, head_dim: int, window: int | None = None) -> dict[str, Any]:
    """ModelConfig fields of a dense model without MLA, MTP or vision; families override what they have more of.

    Rope scaling and a `window` stay in the checkpoint's own config.json: trainers and engines read them there.
    """
    kinds, known = reader.optional("layer_types", []), {"full_attention", "sliding_attention" if window else "full_attention"}
    if isinstance(kinds, list) and any(kind not in known for kind in kinds):
        found = f"config.json of {reader.name}: `layer_types` has others than {' and '.join(sorted(known))}"
        raise ValueError(f"{found}, which family {family} does not compute")
    heads = reader.whole("num_attention_heads")
    same = "num_key_value_heads" in reader.config and reader.config["num_key_value_heads"] is None
    return {
        "name": reader.name,
        "family": family,
        "num_layers": reader.whole("num_hidden_layers", high=MAX_LAYERS),
        "hidden_size": reader.whole("hidden_size"),
        "ffn_size": reader.whole("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": heads if same else reader.whole("num_key_value_heads"),
        "head_dim": head_dim,
        "vocab_size": reader.whole("vocab_size"),
        "max_context_tokens": reader.whole("max_position_embeddings", high=MAX_CONTEXT),
        "rope_theta": reader.rope_theta(),
        "norm_eps": reader.number("rms_norm_eps"),
        "tied_embeddings": reader.flag("tie_word_embeddings", False),
        "attention_bias": reader.flag("attention_bias", False),
        "qk_norm": qk_norm,
        "initializer_range": reader.number("initializer_range"),
    } | PLAIN
