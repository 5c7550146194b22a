"""Checkpoint folders that somebody else made: read right, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_sources
import pytest
import torch
from convert_sources import model, read_all, write_shards, write_source
from foreign_sources import BF16, DOWN, INT4, Tensors, edit_config, edit_tensors, refused_everywhere, run, start
from safetensors.torch import load_file, save_file

from runner.__main__ import main
from runner.config import compose
from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import draft_folder
from runner.models.build import build_model
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.draft import load_draft

dense, source = foreign_sources.dense, foreign_sources.source


# -- a stored dtype that the plan does not explain ------------------------------------------------------------------


def listed(config: dict[str, Any]) -> None:
    config["quantization_config"]["modules_to_not_convert"].append(DOWN)


def ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append(r"re:.*layers\.1\..*down_proj")


@pytest.mark.parametrize(
    ("tensor_format", "edit"),
    [
        (TensorFormat.fp8("block"), listed),
        (TensorFormat.fp8("channel"), ignored),
        (TensorFormat.fp8("tensor"), ignored),
        (TensorFormat.fp8("block"), lambda config: config.pop("quantization_config")),
        (TensorFormat.fp8("block"), lambda config: config.update(quantization_config=None)),
    ],
)
def test_fp8_without_its_scale(
    source: Path, dense: ModelConfig, tmp_path: Path, tensor_format: TensorFormat, edit: Callable[[dict[str, Any]], object]
) -> None:
    run(source, tmp_path / "fp8", tensor_format)
    assert start(tmp_path / "fp8", dense)[f"{DOWN}.weight"].abs().max() < 1
    edit_config(tmp_path / "fp8", edit)
    refused_everywhere(tmp_path / "fp8", dense, tmp_path, "_proj.weight is stored as torch.float8_e4m3fn")


@pytest.mark.parametrize("tensor_format", [INT4, TensorFormat.mxfp4(), TensorFormat.nvfp4()])
def test_packed_weights_that_the_config_does_not_name(
    source: Path, dense: ModelConfig, tmp_path: Path, tensor_format: TensorFormat
) -> None:
    run(source, tmp_path / "packed", tensor_format)
    edit_config(tmp_path / "packed", lambda config: config["quantization_config"]["ignore"].append(DOWN))
    refused_everywhere(tmp_path / "packed", dense, tmp_path, "are left over, which config.json does not explain")


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "lm_head", "model.layers.0.self_attn.q_norm"])
def test_fp8_where_no_scale_ever_is(source: Path, dense: ModelConfig, tmp_path: Path, name: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)

    edit_tensors(source, edit)
    refused_everywhere(source, dense, tmp_path, f"{name}.weight is stored as torch.float8_e4m3fn")


@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_scale", "weight_zero_point", "input_scale", "weight_g_idx"])
def test_a_scale_beside_a_bf16_weight(source: Path, dense: ModelConfig, tmp_path: Path, part: str) -> None:
    edit_tensors(source, lambda tensors: tensors.update({f"{DOWN}.{part}": torch.ones(1)}))
    refused_everywhere(source, dense, tmp_path, f"{DOWN}.{part}")


def test_a_scale_beside_a_bf16_weight_of_a_quantized_folder(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    """Once decoded with that scale: it says that the weight was quantized, the weight's dtype that it was not."""
    run(source, tmp_path / "fp8", TensorFormat.fp8())
    edit_tensors(tmp_path / "fp8", lambda tensors: tensors.update({f"{DOWN}.weight": tensors[f"{DOWN}.weight"].bfloat16()}))
    refused_everywhere(tmp_path / "fp8", dense, tmp_path, f"{DOWN}.weight has weight in bfloat16")


def test_activation_scales_of_quantized_modules_are_left_out_and_said(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    run(source, tmp_path / "fp8", TensorFormat.fp8())
    more = {f"{DOWN}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_scale": torch.ones(())}
    edit_tensors(tmp_path / "fp8", lambda tensors: tensors.update(more))
    assert start(tmp_path / "fp8", dense)[f"{DOWN}.weight"].abs().max() < 1
    report = run(tmp_path / "fp8", tmp_path / "back", BF16)
    assert any("2 activation scales left out" in note for note in report.notes)
    assert not read_all(tmp_path / "back").keys() & more.keys()


EXTRA: Tensors = {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2).bfloat16()}  # the model has two layers


def renamed(folder: Path) -> None:
    """Shards whose numbers tell everything, without an index."""
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.up_proj.weight", "score.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"]
)
@pytest.mark.parametrize("tensor_format", [BF16, INT4, TensorFormat.fp8(), TensorFormat.fp8("channel"), TensorFormat.nvfp4()])
@pytest.mark.parametrize("indexed", [True, False])
def test_weights_that_the_model_does_not_use(
    source: Path, dense: ModelConfig, tmp_path: Path, name: str, tensor_format: TensorFormat, indexed: bool
) -> None:
    """In plain and quantized folders, with an index or without: by every door, in both directions."""
    folder = source
    if tensor_format.quantized:
        run(source, tmp_path / "q", tensor_format)
        folder = tmp_path / "q"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 2).bfloat16()}))
    if not indexed:
        renamed(folder)
    refused_everywhere(folder, dense, tmp_path, f"does not use: 1 weights, first {name}")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_deeper_checkpoint_than_its_config_says(tmp_path: Path, quantized: bool) -> None:
    """A layer behind the last one is a multi-token-prediction layer only where it has that layer's projection."""
    deeper, config = model("deepseek", num_layers=3), model("deepseek", num_layers=2)
    write_source(tmp_path / "source", deeper)
    if quantized:
        run(tmp_path / "source", tmp_path / "q")
    folder = tmp_path / ("q" if quantized else "source")
    edit_config(folder, lambda values: values.update(num_hidden_layers=2))
    refused_everywhere(folder, config, tmp_path, "model.layers.2.")


@pytest.mark.parametrize("quantized", [False, True])
def test_what_published_folders_hold_and_nothing_computes(
    tmp_path: Path, quantized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary frequencies and the layer that DeepSeek-V3 has behind its last one are left out and said, an equal lm_head stays."""
    config = model("deepseek", tied_embeddings=True)
    weights = write_source(tmp_path / "source", config)
    more = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    more |= {f"model.layers.2.{name}.weight": torch.ones(2, 2).bfloat16() for name in ("eh_proj", "enorm", "mlp.gate")}
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    if quantized:
        run(tmp_path / "source", tmp_path / "q")
    folder = tmp_path / ("q" if quantized else "source")
    edit_tensors(folder, lambda tensors: tensors.update(more | head))
    started = start(folder, config)
    assert started.keys() == start(tmp_path / "source", config).keys()
    report = run(folder, tmp_path / "target", BF16 if quantized else INT4)
    notes = " ".join(report.notes)
    assert (
        "3 tensors of multi-token-prediction layers" in notes
        and "2 rotary frequencies" in notes
        and "lm_head.weight, which is tied" in notes
    )
    written = read_all(tmp_path / "target")
    assert not written.keys() & more.keys() and torch.equal(written["lm_head.weight"], head["lm_head.weight"])
    assert main(["audit", str(folder), f"precision={'int4_qat' if quantized else 'bf16'}", "precision.group_size=32"]) == 0, (
        capsys.readouterr().out
    )


def test_a_tied_head_with_values_of_its_own(tmp_path: Path) -> None:
    """transformers 5 then unties the two, engines do not."""
    config = model("qwen3", tied_embeddings=True)
    weights = write_source(tmp_path / "source", config)
    head = weights["model.embed_tokens.weight"].clone()
    edit_tensors(tmp_path / "source", lambda tensors: tensors.update({"lm_head.weight": head}))
    start(tmp_path / "source", config)
    edit_tensors(tmp_path / "source", lambda tensors: tensors.update({"lm_head.weight": head + 1}))
    refused_everywhere(tmp_path / "source", config, tmp_path, "holds another lm_head")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_tied_head_is_the_embedding(tmp_path: Path, family: str, quantized: bool) -> None:
    """Also where weights are filled in one by one: in quantized folders, and without an index."""
    config = model(family, tied_embeddings=True)
    write_source(tmp_path / "source", config)
    if quantized:
        run(tmp_path / "source", tmp_path / "q")
    else:
        renamed(tmp_path / "source")
    folder = tmp_path / ("q" if quantized else "source")
    built = build_model(replace(config, hf_checkpoint=str(folder)), dtype=torch.bfloat16, seed=1)
    assert built.get_output_embeddings().weight is built.get_input_embeddings().weight


def test_weights_that_lie_in_two_places(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    """transformers takes the last file that has a name, and model.safetensors before any index."""
    one = tmp_path / "one"
    shutil.copytree(source, one)
    write_shards(one, read_all(source), 1)
    refused_everywhere(one, dense, tmp_path, "libraries differ in which of the two they read")
    two, files = tmp_path / "two", sorted(path.name for path in source.glob("*.safetensors"))
    shutil.copytree(source, two)
    tensors = load_file(two / files[0])
    first = min(tensors)
    save_file(load_file(two / files[1]) | {first: tensors[first] + 1}, two / files[1], {"format": "pt"})
    refused_everywhere(two, dense, tmp_path, f"{first} lies in {files[0]} and in {files[1]}")


def test_a_draft_model_is_read_by_the_same_check(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    draft_folder.check_whole(dense, str(source))
    edit_tensors(source, lambda tensors: tensors.update(EXTRA))
    with pytest.raises(UserError, match=r"speculative\.draft_model: .* does not use: 1 weights, first model\.layers\.7"):
        draft_folder.check_whole(dense, str(source))
    cfg = compose.load(["model=tiny_dense", "speculative=draft", f"speculative.draft_model={source}"], check_rules=False).config
    cfg.model = dense
    with pytest.raises(UserError, match="does not use: 1 weights"):
        load_draft(cfg, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="does not use: 1 weights"):
        draft_folder.check_folder(cfg)
    edit_config(source, lambda values: values.update(architectures=["GptForCausalLM"], model_type="gpt"))
    draft_folder.check_whole(dense, str(source))  # no table here: its engine's matter


def test_an_eagle_head_with_more_than_a_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}))
    good = {
        **{
            f"layers.0.{name}.weight": torch.ones(2, 2)
            for name in ("self_attn.q_proj", "mlp.up_proj", "post_attention_layernorm")
        },
        "fc.weight": torch.ones(2, 4),
        "fc.bias": torch.ones(2),
        "embed_tokens.weight": torch.ones(5, 2),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(good, tmp_path / "model.safetensors")
    draft_folder.check_eagle(str(tmp_path))
    for name in ("layers.1.mlp.up_proj.weight", "d2t", "midlayer.mlp.up_proj.weight"):
        save_file(good | {name: torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"EAGLE head does not use: 1 weights, first {name}"):
            draft_folder.check_eagle(str(tmp_path))
    save_file(good | {"fc.weight": torch.ones(2, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="quantized weights"):
        draft_folder.check_eagle(str(tmp_path))


def test_a_broken_folder_against_a_config(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "q")
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.weight_shape": torch.tensor(5)}))
    assert main(["audit", str(tmp_path / "q"), "precision=int4_qat"]) == 1
    assert "weight_shape of shape ()" in capsys.readouterr().out


def test_e5m2_is_not_e4m3(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    run(source, tmp_path / "fp8", TensorFormat.fp8())

    def edit(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].float().to(torch.float8_e5m2)

    edit_tensors(tmp_path / "fp8", edit)
    refused_everywhere(tmp_path / "fp8", dense, tmp_path, "has weight in float8_e5m2")
