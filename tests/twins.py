"""Tiny twins: a published config.json with its sizes shrunk, everything else as published, and random weights of that model.

One function for all families (`shrunk`): what a config.json says of the architecture (biases, norms, rotary scaling, routers,
groups of experts, dense first layers, shared experts) stays, so that a twin is refused or computed as its original is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from runner.config.schema import ModelConfig
from runner.convert.source import model_of as model_of_source
from runner.convert.source import one_by_one, open_shard, open_source, read
from runner.models import auto, family_of
from runner.models.config_file import recognized
from runner.models.family import Family
from runner.models.tokenizer import byte_tokenizer
from runner.models.vocabulary import EOS_ID, PAD_ID, VOCAB_SIZE

HERE = Path(__file__).parent
# of text models: by model group, and by family where no group of conf/model has it ("_from": whose config.json it is)
OF_FAMILIES: dict[str, dict[str, Any]] = json.loads((HERE / "published_families.json").read_text())
_OF_MODELS: dict[str, dict[str, Any]] = json.loads((HERE / "published_configs.json").read_text())
PUBLISHED = {name: config for name, config in _OF_MODELS.items() if "vision_config" not in config} | OF_FAMILIES
HEADS, HEAD_DIM, HIDDEN, EXPERTS = 4, 16, 64, 8
CONTEXT = 256
SIZES = {  # key of a config.json -> its size in a twin
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB_SIZE + 16,  # transformers' class of a family adds tokens of its own to the tokenizer
    "max_position_embeddings": CONTEXT,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window_pattern": 2,  # Gemma 3: every second layer sees everything
    "initializer_range": 0.05,  # sizes: so that logits of a narrow model are as wide as those of the original
}
# centre and spread of what transformers starts at zero or one, which would hide that it was left out
DRAWN = {
    "bias": (0.0, 0.1),
    "gate.weight": (0.0, 0.5),
    "router.weight": (0.0, 0.5),
    "norm.weight": (1.0, 0.2),
    "sinks": (0.0, 1.0),
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the twin: as few layers as show every kind, ratios of heads and shared experts kept, unquantized."""
    tiny = {key: SIZES.get(key, value) for key, value in config.items() if key not in ("_from", "quantization_config")}
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv:
        tiny["num_key_value_heads"] = max(1, HEADS * kv // heads)
    if "shared_expert_intermediate_size" in config:
        times = config["shared_expert_intermediate_size"] // config["moe_intermediate_size"]
        tiny["shared_expert_intermediate_size"] = times * SIZES["moe_intermediate_size"]
    if config.get("q_lora_rank"):
        tiny["q_lora_rank"] = 24
    if config.get("n_group", 1) > 1:
        tiny |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    dense = min(1, config.get("first_k_dense_replace") or 0)
    if "first_k_dense_replace" in config:
        tiny["first_k_dense_replace"] = dense
    layers = tiny["num_hidden_layers"] = 2 + dense
    if "rotary_dim" in config:
        tiny["rotary_dim"] = HEAD_DIM * config["rotary_dim"] // config["head_dim"]
    of_layers = [key for key, value in config.items() if isinstance(value, list) and len(value) == config["num_hidden_layers"]]
    tiny |= {key: config[key][:layers] for key in of_layers}
    if tiny.get("rope_scaling"):
        tiny["rope_scaling"] = _shrunk_rope(config["rope_scaling"], config["max_position_embeddings"])
    ids = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": None}
    return tiny | {key: value for key, value in ids.items() if key in config}


def one_of_each_family() -> list[str]:
    """Names of PUBLISHED, the first of each family."""
    found: dict[str, str] = {}
    for name in (*OF_FAMILIES, *PUBLISHED):
        found.setdefault(family_name(name), name)
    return sorted(found.values())


def family_name(name: str) -> str:
    """The family that reads PUBLISHED[name]."""
    return recognized(PUBLISHED[name], name).name


def _shrunk_rope(rope: dict[str, Any], context: int) -> dict[str, Any]:
    """The same kind and factors; the original context is the same part of the twin's."""
    key = "original_max_position_embeddings"
    return rope | ({key: max(4, rope[key] * CONTEXT // context)} if key in rope else {})


def twin(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> ModelConfig:
    """A checkpoint folder of the twin of PUBLISHED[name], random weights by transformers' own class, biases that are not zero,
    the byte tokenizer; the model group that model=auto makes of it."""
    values = shrunk(PUBLISHED[name]) | changes
    family = recognized(values, folder)
    family.register()
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(_transformers_config(values, family), dtype=torch.float32).to(dtype)
        for weight_name, tensor in built.state_dict().items():
            for end, (centre, spread) in DRAWN.items():
                if weight_name.endswith(end):
                    tensor.copy_(centre + spread * torch.randn(tensor.shape))
    built.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}))
    byte_tokenizer().save_pretrained(folder)
    return model_of(folder)


def mxfp4_twin(folder: Path) -> ModelConfig:
    """The twin of gpt-oss with experts as published. Codes and scales are drawn, not quantized: any that a folder may hold,
    groups without a code of 4 or 6 among them, whose scale is larger than it would have to be."""
    twin(folder, "gpt_oss")
    weights, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        codes = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
        small = torch.rand(experts, rows, columns // 32, 1, generator=draw) < 0.2
        weights[f"{name}_blocks"] = torch.where(small, codes & 0xBB, codes)  # without bit 2 of each code: 0, 0.5, 1 and 1.5
        weights[f"{name}_scales"] = torch.randint(118, 122, (experts, rows, columns // 32), generator=draw).to(torch.uint8)
    write_weights(folder, weights)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = PUBLISHED["gpt_oss"]["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    return model_of(folder)


def _transformers_config(values: dict[str, Any], family: Family) -> Any:
    """transformers' own class of the architecture, whatever a published config.json calls its model_type (kimi_k2)."""
    own = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    return CONFIG_MAPPING[family.model_types[0]].from_dict(own)


def loaded_by_transformers(folder: Path, **arguments: Any) -> torch.nn.Module:
    """transformers' model of the folder, as it reads it itself."""
    values = json.loads((folder / "config.json").read_text())
    config = _transformers_config(values, recognized(values, folder))
    built: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, config=config, **arguments)
    return built


def config_alone(folder: Path, name: str, **changes: object) -> str:
    """A folder with PUBLISHED[name] as its config.json and nothing else; what names it on the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name] | changes))
    return f"model.hf_checkpoint={folder}"


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig(**auto.architecture(str(folder)), hf_checkpoint=str(folder))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a single-file folder, experts one by one under the names of the family's table."""
    opened = open_source(folder)
    model = model_of_source(opened)
    source = one_by_one(opened, family_of(model).parameters(model))
    with open_shard(folder / "model.safetensors") as handle:
        return {name: read(handle, stored) for name, stored in source.tensors.items()}


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
