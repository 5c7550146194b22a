"""Folders in the shape of published checkpoints that bring code of their own: Moonlight's and Kimi-K2's, at toy size.

Their code files are planted: each leaves a mark in `ran` when it runs, and nothing of this project may run them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from convert_sources import model, write_source

from runner.config.schema import ModelConfig

BYTES = 256
MERGES = (
    "th",
    "he",
    "in",
    "er",
    "an",
    " t",
    "the",
    " the",
    "ing",
    "12",
    "34",
    "  ",
    "    ",
    "\n\n",
    "Th",
    "'s",
    "中",
    "文",
    "中文",
    "aa",
)
BASE = BYTES + 20 + 2  # two more merges make up the bytes of a Han character
VOCAB = BASE + 256
NAMED = {
    BASE: "[BOS]",
    BASE + 1: "[EOS]",
    BASE + 2: "<|im_end|>",
    BASE + 3: "<|im_user|>",
    BASE + 250: "[UNK]",
    BASE + 251: "[PAD]",
}
TEMPLATE = "{% for message in messages %}<|im_user|>{{ message['content'] }}<|im_end|>{% endfor %}"
PLANTED = """import os
open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "ran"), "a").write(__name__)
open({mark!r}, "a").write(__name__)
raise RuntimeError("code of a checkpoint was run")
"""


def ranks() -> dict[bytes, int]:
    """A small vocabulary: the bytes in an order of its own, then merges."""
    order = [*range(33, 127), *range(33), *range(127, 256)]
    tokens = [bytes([byte]) for byte in order] + [b"\xe4\xb8", b"\xe6\x96", *(text.encode() for text in MERGES)]
    assert len(tokens) == BASE
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path, module: str) -> None:
    """tiktoken.model, tokenizer_config.json as published, and code."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks().items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings: dict[str, Any] = {
        "added_tokens_decoder": {str(index): {"content": text} | flags for index, text in NAMED.items()},
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>"],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
        "auto_map": {"AutoTokenizer": [f"{module}.TikTokenTokenizer", None]},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / f"{module}.py").write_text(PLANTED.format(mark=str(folder.parent / "ran")))


def published(folder: Path, kind: str, **fields: Any) -> ModelConfig:
    """A folder of kind "moonlight" or "kimi" with random weights; the model group that reads it. `fields` change the model."""
    if kind == "kimi":
        fields = {"num_shared_experts": 1} | fields
    config = model("deepseek", vocab_size=VOCAB, **({"q_lora_rank": 0} if kind == "moonlight" else {}) | fields)
    write_source(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    values |= {
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "model_type": {"moonlight": "deepseek_v3", "kimi": "kimi_k2"}[kind],
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "seq_aux": True,
        "pretraining_tp": 1,
    }
    if kind == "kimi":
        values["rope_scaling"] = {
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(PLANTED.format(mark=str(folder.parent / "ran")))
    write_tokenizer(folder, {"moonlight": "tokenization_moonshot", "kimi": "tokenization_kimi"}[kind])
    return ModelConfig(**(vars(config) | {"hf_checkpoint": str(folder)}))


def with_planted_code(folder: Path) -> None:
    """Add to any checkpoint folder code that config.json and tokenizer_config.json ask to run."""
    for name, kinds in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {kind: f"planted.{kind}" for kind in kinds}
        (folder / name).write_text(json.dumps(values))
    (folder / "planted.py").write_text(PLANTED.format(mark=str(folder.parent / "ran")))


def overrides(config: ModelConfig, base: str = "tiny_mla") -> list[str]:
    """What a user types for such a folder."""
    left_out = ("name", "toy_twin", "int4_group_size", "vision")
    values = {key: value for key, value in vars(config).items() if key not in left_out}
    return [
        f"model={base}",
        *(f"model.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()),
    ]


def nothing_ran(folder: Path) -> bool:
    return not (folder / "ran").exists() and not (folder.parent / "ran").exists() and not Path("ran").exists()
