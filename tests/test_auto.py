"""model=auto: from a folder with config.json alone to a plan, with one message for what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.__main__ import main
from runner.config import compose, preflight
from runner.errors import UserErrors
from runner.models import agreement, family_of
from tests import twins


def refused(*overrides: str) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        compose.load(["model=auto", *overrides])
    return [str(error) for error in caught.value.errors]


def test_a_plan_needs_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = twins.config_alone(tmp_path / "qwen", "qwen2")
    assert main(["plan", "model=auto", folder]) in (0, 1)
    printed = capsys.readouterr().out
    assert "qwen: 7.62 B parameters" in printed


def test_what_is_typed_and_what_a_file_says(tmp_path: Path) -> None:
    folder = twins.config_alone(tmp_path / "m", "mixtral")
    cfg = compose.load(["model=auto", folder, "model.max_context_tokens=16384", "router_replay=none"]).config
    assert cfg.model.max_context_tokens == 16384 and not cfg.router_replay.trainer
    (said,) = refused(folder, "model.num_layers=7")
    assert "has num_layers 32, the model group 7" in said
    both = refused(folder, "model.num_layers=7", "precision.group_sise=4")
    assert len(both) == 2 and any("did you mean precision.group_size" in text for text in both)


def test_what_a_machine_lacks_is_said_with_commands_for_this_checkpoint(tmp_path: Path) -> None:
    one_gpu = ["parallelism=h200x1", "rollout.max_parameters_on_gpu=0"]
    cfg = compose.load(["model=auto", twins.config_alone(tmp_path / "m", "llama"), *one_gpu]).config
    with pytest.raises(UserErrors, match="needs 1 GPU") as caught:
        preflight.check(cfg)
    said = str(caught.value)
    assert f"model=auto model.hf_checkpoint={tmp_path / 'm'}" in said and "scale=laptop" not in said


@pytest.mark.parametrize("engine", [["trainer=megatron", "parallelism=cpu2"], ["rollout=sglang"]], ids=["megatron", "sglang"])
def test_a_window_is_refused_where_nothing_would_apply_it(tmp_path: Path, engine: list[str]) -> None:
    """Mistral-7B-v0.1's, and not in a context that it covers."""
    folder = twins.config_alone(tmp_path / "m", "mistral", sliding_window=4096)
    chosen = ["model=auto", folder, *engine, "rollout.sampling.max_response_tokens=1024"]
    with pytest.raises(UserErrors, match="some layers of .* see 4096 tokens, of a context of 32768"):
        compose.load(chosen)
    cfg = compose.load([*chosen, "model.max_context_tokens=4096"]).config
    assert agreement.window_problem(cfg.model, family_of(cfg.model), {"sliding_window": 4096}) is None
    compose.load(["model=auto", folder])


def test_one_clear_refusal(tmp_path: Path) -> None:
    (said,) = refused()
    assert "none is named" in said and "model.hf_checkpoint=" in said
    (said,) = refused(f"model.hf_checkpoint={tmp_path / 'nothing'}")
    assert "there is no folder" in said
    (tmp_path / "empty").mkdir()
    (said,) = refused(f"model.hf_checkpoint={tmp_path / 'empty'}")
    assert "config.json is missing" in said
    (said,) = refused(twins.config_alone(tmp_path / "a", "qwen2", model_type="qwen9", architectures=["Qwen9ForCausalLM"]))
    assert "Qwen9ForCausalLM, of model_type qwen9" in said and "the nearest is qwen" in said and "mixtral" in said
    (said,) = refused(twins.config_alone(tmp_path / "b", "qwen2", architectures=["Qwen2ForSequenceClassification"]))
    assert "family qwen2 reads Qwen2ForCausalLM" in said
    (said,) = refused(twins.config_alone(tmp_path / "c", "mistral", sliding_window="wide"))
    assert "`sliding_window` is 'wide'" in said
    (said,) = refused(twins.config_alone(tmp_path / "d", "glm4", partial_rotary_factor=1.0))
    assert "partial_rotary_factor" in said
    (said,) = refused(twins.config_alone(tmp_path / "e", "qwen2"), "scale=laptop")
    assert "no toy twin" in said


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_headers_are_held_against_the_table_before_anything_loads(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    twins.twin(tmp_path / "t", name)
    words = ["plan", "model=auto", f"model.hf_checkpoint={tmp_path / 't'}", "task=arithmetic", "run=toy"]
    assert main(words) == 0
    weights = twins.weights_of(tmp_path / "t")
    first = next(key for key in weights if key.endswith(("down_proj.weight", "w2.weight")))
    twins.write_weights(tmp_path / "t", weights | {first: torch.zeros(64, 65, dtype=torch.bfloat16)})
    capsys.readouterr()
    assert main(words) == 2
    assert first in capsys.readouterr().err
    del weights[first]
    twins.write_weights(tmp_path / "t", weights)
    assert main(words) == 2 and first in capsys.readouterr().err
