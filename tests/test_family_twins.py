"""Every family on a tiny twin of a published config.json (twins.py): read, computed and written as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from runner.config.schema import ModelConfig
from runner.models import FAMILIES, agreement, family_of
from runner.models.build import build_model, disk_tensors, memory_tensors, named_weights
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.attention import ATTENTION, KVCache
from runner.rollout.local.model import EngineModel
from runner.routing.replay import RouterReplay
from runner.trainer import attention, experts
from tests import twins

TWINS = sorted(twins.PUBLISHED)
USED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, {"use_sliding_window": False}
EVERY_LAYER = {"sliding_window": 8}, {"sliding_window": None}
# what a config.json says to have a window in some layers, and to have none
WINDOWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": USED,
    "qwen3_4b": USED,
    "mistral": EVERY_LAYER,
    "mixtral": EVERY_LAYER,
    "gemma3": ({"sliding_window": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, {"sliding_window": 256}),
    "gpt_oss": ({"sliding_window": 8}, {"layer_types": ["full_attention"] * 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ModelConfig]]:
    """Every twin, written once."""
    root = tmp_path_factory.mktemp("twins")
    return {name: (root / name, twins.twin(root / name, name)) for name in TWINS}


def test_every_text_family_has_a_twin(folders: dict[str, tuple[Path, ModelConfig]]) -> None:
    assert {model.family for _, model in folders.values()} == {name for name, family in FAMILIES.items() if name != "qwen3_vl"}


def as_trained(model: ModelConfig) -> torch.nn.Module:
    """With the attention and the experts of the torch trainer."""
    return build_model(model, dtype=torch.float32, seed=0, attention=attention.register(), experts=experts.register())


@pytest.mark.parametrize("name", TWINS)
def test_trainer_and_engine_compute_transformers_logits(name: str, folders: dict[str, tuple[Path, ModelConfig]]) -> None:
    """fp32, 1e-4; and the trainer goes through the experts that the engine chose."""
    folder, model = folders[name]
    family = family_of(model)
    family.register()
    tokens = torch.randint(16, 272, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = twins.loaded_by_transformers(folder, dtype=torch.float32)(tokens[None]).logits[0]
        trainer = as_trained(model)
        ours = trainer(tokens[None]).logits[0]
        module = build_model(model, dtype=torch.float32, seed=0, attention=ATTENTION, experts="eager")
        plan = PrecisionPlan.with_format(model, TensorFormat.bf16(), ())
        engine = EngineModel(model, plan, torch.float32, torch.device("cpu"), module)
        cache = KVCache(1, 64, torch.float32, torch.device("cpu"))
        decoded = engine.logits(engine.forward(cache, tokens.numpy(), np.array([0]), np.array([len(tokens)])))
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-4 and (decoded - theirs).abs().max() < 1e-4
    routes = engine.routes()
    assert (routes is None) == (not model.num_experts)
    if routes is None:
        return
    replay = RouterReplay(trainer, family.routers(model), model.router_score, normalizes=family.normalizes_top_k)
    recorded = torch.ones(len(tokens), dtype=torch.bool)
    with torch.no_grad(), replay.replaying(routes.transpose(0, 1).contiguous(), recorded):
        again = trainer(tokens[None]).logits[0]
    assert (again - theirs).abs().max() < 1e-4 and replay.take_statistics() == {"router_replay/disagreement": 0.0}
    with torch.no_grad(), replay.replaying((routes.transpose(0, 1) + 1) % model.num_experts, recorded):
        assert (trainer(tokens[None]).logits[0] - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_that_see_a_window(name: str, tmp_path: Path) -> None:
    """A prefill, and the tokens behind it one at a time."""
    windows, everything = WINDOWS[name]
    model = twins.twin(tmp_path / name, name, **windows)
    tokens = torch.randint(16, 272, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = twins.loaded_by_transformers(tmp_path / name, dtype=torch.float32)(tokens[None]).logits[0]
        ours = as_trained(model)(tokens[None]).logits[0]
        module = build_model(model, dtype=torch.float32, seed=0, attention=ATTENTION)
        plan = PrecisionPlan.with_format(model, TensorFormat.bf16(), ())
        engine = EngineModel(model, plan, torch.float32, torch.device("cpu"), module)
        cache = KVCache(1, 64, torch.float32, torch.device("cpu"))
        pieces = [tokens[:30], *tokens[30:].split(1)]
        starts = [0, *range(30, 40)]
        hidden = [
            engine.forward(cache, piece.numpy(), np.array([start]), np.array([len(piece)]))
            for piece, start in zip(pieces, starts, strict=True)
        ]
        decoded = engine.logits(torch.cat(hidden))
        values = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(values | everything))
        whole = as_trained(model)(tokens[None]).logits[0]
    assert (ours - theirs).abs().max() < 1e-4 and (decoded - theirs).abs().max() < 1e-4
    assert (whole - theirs)[:8].abs().max() < 1e-4 < (whole - theirs)[9:].abs().max()


def test_rotary_numbers_of_kinds_of_layers_as_transformers_writes_them(tmp_path: Path) -> None:
    """Gemma 3: what a layer that sees everything has is the model group's, in either form; a kind that follows the batch is
    refused in both."""
    rope = {"factor": 8.0, "rope_type": "linear"}
    values = twins.shrunk(twins.PUBLISHED["gemma3"]) | {"rope_scaling": rope, "rope_theta": 5000.0}
    rewritten = CONFIG_MAPPING["gemma3_text"].from_dict(values).to_dict() | {"architectures": values["architectures"]}
    assert set(rewritten["rope_parameters"]) == {"full_attention", "sliding_attention"} and "rope_theta" not in rewritten
    family = FAMILIES["gemma3"]
    read = [family.from_hf_config(config, "gemma3") for config in (values, rewritten)]
    assert read[0] == read[1] and read[0]["rope_theta"] == 5000.0 and read[0]["tied_embeddings"]
    assert [agreement.Rope.of(config).kind for config in (values, rewritten)] == ["linear", "linear"]
    rewritten["rope_parameters"]["full_attention"]["rope_type"] = "dynamic"
    assert agreement.Rope.of(rewritten).problem()


@pytest.mark.parametrize("name", TWINS)
def test_weights_go_to_memory_and_back_bit_for_bit(name: str, folders: dict[str, tuple[Path, ModelConfig]]) -> None:
    folder, model = folders[name]
    family, stored = family_of(model), twins.weights_of(folder)
    assert {p.name: p.shape for p in family.parameters(model)} == {key: tuple(tensor.shape) for key, tensor in stored.items()}
    built = build_model(model, dtype=torch.bfloat16, seed=0)
    memory = dict(named_weights(model, built))
    assert {key: tuple(tensor.shape) for key, tensor in memory_tensors(family, model, stored)} == {
        key: tuple(tensor.shape) for key, tensor in memory.items()
    }
    back = dict(disk_tensors(family, model, memory.items()))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key].to(tensor.dtype), tensor) for key, tensor in stored.items())
