"""Checkpoint folders that somebody else made: read right, or refused with the reason; nothing outside is written or copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import model, read_all, write_shards, write_source
from safetensors.torch import load_file, save_file

from runner.__main__ import main
from runner.config import compose
from runner.config.schema import Convention, ModelConfig, PrecisionConfig, Role
from runner.convert.engine import Report, convert
from runner.errors import UserError
from runner.models import draft_folder
from runner.models.build import build_model
from runner.precision import fp4
from runner.precision.plan import quantized_roles
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.draft import load_draft

INT4 = TensorFormat.int4(32, Convention.exact)
BF16 = TensorFormat.bf16()
DOWN = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def default_roles(config: ModelConfig) -> frozenset[Role]:
    return quantized_roles(config, PrecisionConfig(roles=None))


def run(source: Path, target: Path, tensor_format: TensorFormat = INT4) -> Report:
    return convert(source, target, tensor_format, default_roles, workers=1)


def start(source: Path, config: ModelConfig) -> Tensors:
    """What a trainer starts from."""
    return dict(build_model(replace(config, hf_checkpoint=str(source)), dtype=torch.bfloat16, seed=1).named_parameters())


def refused_everywhere(source: Path, config: ModelConfig, tmp_path: Path, words: str) -> None:
    """By the converter in both directions, by the start of a run, and by the audit, which lists it."""
    for tensor_format in (BF16, INT4):
        with pytest.raises(UserError) as caught:
            run(source, tmp_path / "refused", tensor_format)
        assert words in str(caught.value) or "already quantized" in str(caught.value)
        assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.partial").exists()
    with pytest.raises(UserError) as caught:
        start(source, config)
    assert words in str(caught.value)
    assert main(["audit", str(source), str(source)]) in (1, 2)  # differences, or a folder that cannot be opened


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = read_all(folder)
    edit(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, 3)


@pytest.fixture
def dense() -> ModelConfig:
    return model("qwen3", hidden_size=128, ffn_size=256, head_dim=32)


@pytest.fixture
def source(tmp_path: Path, dense: ModelConfig) -> Path:
    write_source(tmp_path / "source", dense)
    return tmp_path / "source"


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


# -- scales of another shape or dtype -------------------------------------------------------------------------------


def square(config: ModelConfig) -> ModelConfig:
    """Where a scale per row also broadcasts over columns."""
    return replace(config, ffn_size=config.hidden_size)


def expected_back(folder: Path, tmp_path: Path) -> Tensors:
    run(folder, tmp_path / "expected", BF16)
    return read_all(tmp_path / "expected")


def both_ways_equal(folder: Path, config: ModelConfig, tmp_path: Path, expected: Tensors) -> None:
    run(folder, tmp_path / "back", BF16)
    back, started = read_all(tmp_path / "back"), start(folder, config)
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name
        assert name not in started or torch.equal(started[name], tensor), name


@pytest.mark.parametrize("tensor_format", [TensorFormat.fp8("channel"), TensorFormat.int4(-1, Convention.kimi)])
def test_channel_scales_as_one_row(tmp_path: Path, dense: ModelConfig, tensor_format: TensorFormat) -> None:
    config = square(dense)
    write_source(tmp_path / "source", config)
    run(tmp_path / "source", tmp_path / "q", tensor_format)
    expected = expected_back(tmp_path / "q", tmp_path)

    def flat(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = tensors[name].flatten()

    edit_tensors(tmp_path / "q", flat)
    both_ways_equal(tmp_path / "q", config, tmp_path, expected)


@pytest.mark.parametrize("tensor_format", [TensorFormat.fp8("block"), TensorFormat.fp8("channel"), TensorFormat.fp8("tensor")])
@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_in_another_dtype(tmp_path: Path, dense: ModelConfig, tensor_format: TensorFormat, dtype: torch.dtype) -> None:
    """Powers of two, which all these dtypes hold: the same weights come back whatever the scales' dtype."""
    write_source(tmp_path / "source", dense)
    run(tmp_path / "source", tmp_path / "q", tensor_format)

    def rounded(tensors: Tensors) -> None:
        for name in tensors:
            if "weight_scale" in name:
                tensors[name] = torch.exp2(tensors[name].log2().round())

    edit_tensors(tmp_path / "q", rounded)
    expected = expected_back(tmp_path / "q", tmp_path)
    edit_tensors(
        tmp_path / "q",
        lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items() if "weight_scale" in name}),
    )
    both_ways_equal(tmp_path / "q", dense, tmp_path, expected)


def test_mxfp4_scales_by_their_own_dtype(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    run(source, tmp_path / "q", TensorFormat.mxfp4())
    expected = expected_back(tmp_path / "q", tmp_path)

    def e8m0(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    edit_tensors(tmp_path / "q", e8m0)
    both_ways_equal(tmp_path / "q", dense, tmp_path, expected)


def test_every_e8m0_value_is_torchs_own() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(fp4.e8m0_to_float(every), every.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(
    ("tensor_format", "part", "change"),
    [
        (INT4, "weight_scale", lambda t: t[:, ::2]),  # too few groups: twice as wide ones, without an error
        (INT4, "weight_scale", lambda t: t.repeat_interleave(2, 1)),
        (INT4, "weight_scale", lambda t: t[:, :1]),
        (INT4, "weight_scale", lambda t: t.to(torch.float8_e8m0fnu)),
        (INT4, "weight_packed", lambda t: t[:, :-1]),
        (INT4, "weight_packed", lambda t: t.to(torch.int64)),
        (TensorFormat.int8(64, Convention.kimi), "weight_scale", lambda t: t[:, :1]),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: t[:1, :1]),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: torch.cat([t, t])),
        (TensorFormat.fp8("block"), "weight_scale_inv", lambda t: t.to(torch.int32)),
        (TensorFormat.fp8("channel"), "weight_scale", lambda t: t.T),
        (TensorFormat.fp8("channel"), "weight_scale", lambda t: t[:1]),
        (TensorFormat.fp8("tensor"), "weight_scale", lambda t: t.repeat(2)),
        (TensorFormat.mxfp4(), "weight_scale", lambda t: t[:, ::2]),
        (TensorFormat.nvfp4(), "weight_scale", lambda t: t[:, ::2]),
        (TensorFormat.nvfp4(), "weight_global_scale", lambda t: t.repeat(2)),
        (TensorFormat.nvfp4(), "weight_global_scale", lambda t: t.bfloat16()),
    ],
)
def test_parts_of_another_shape_or_dtype(
    source: Path,
    dense: ModelConfig,
    tmp_path: Path,
    tensor_format: TensorFormat,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    run(source, tmp_path / "q", tensor_format)
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.{part}": change(tensors[f"{DOWN}.{part}"])}))
    refused_everywhere(tmp_path / "q", dense, tmp_path, f"{DOWN}.weight has {part}")


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_packed"])
def test_a_part_that_is_missing(source: Path, dense: ModelConfig, tmp_path: Path, part: str) -> None:
    run(source, tmp_path / "q")
    edit_tensors(tmp_path / "q", lambda tensors: tensors.pop(f"{DOWN}.{part}"))
    refused_everywhere(tmp_path / "q", dense, tmp_path, f"{DOWN}.weight has no {part} beside it")


def test_a_shape_that_the_parts_do_not_have(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    """Headers do not show what weight_shape says."""
    run(source, tmp_path / "q")
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.weight_shape": torch.tensor([128, 252])}))
    for opened in (lambda: run(tmp_path / "q", tmp_path / "back", BF16), lambda: start(tmp_path / "q", dense)):
        with pytest.raises(UserError, match="down_proj"):
            opened()


@pytest.mark.parametrize("value", [255, 254])
def test_scales_that_give_no_number(source: Path, dense: ModelConfig, tmp_path: Path, value: int) -> None:
    run(source, tmp_path / "q", TensorFormat.fp8())
    scale = torch.full((1, 2), value, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    edit_tensors(tmp_path / "q", lambda tensors: tensors.update({f"{DOWN}.weight_scale_inv": scale}))
    for opened in (lambda: run(tmp_path / "q", tmp_path / "back", BF16), lambda: start(tmp_path / "q", dense)):
        with pytest.raises(UserError, match="down_proj.*(not finite|NaN|infinite)"):
            opened()


# -- nothing outside source and target is written, and nothing outside the source is copied --------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["dotdot", "absolute", "folder", "dots", "empty", "number", "other", "long", "hidden", "null"])
def test_an_index_that_names_files_elsewhere(source: Path, dense: ModelConfig, tmp_path: Path, kind: str) -> None:
    (source / "part").mkdir()
    precious = {"folder": source / "part", "other": source}.get(kind, tmp_path) / "precious.safetensors"
    (source / "model-00002-of-00003.safetensors").rename(precious)
    named: Any = {
        "dotdot": "../precious.safetensors",
        "absolute": str(precious),
        "folder": "part/precious.safetensors",
        "dots": "..",
        "empty": "",
        "number": 5,
        "other": "config.json",
        "long": "x" * 300 + ".safetensors",
        "hidden": ".convert.jsonl.safetensors",
        "null": "a\0.safetensors",
    }[kind]
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: named if "-00002-of" in v else v for k, v in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    before = digest(precious)
    for opened in (lambda: run(source, tmp_path / "target"), lambda: start(source, dense)):
        with pytest.raises(UserError, match="files in the folder itself"):
            opened()
    assert main(["convert", f"source={source}", f"target={tmp_path / 'target'}"]) == 2
    assert digest(precious) == before and not (tmp_path / "target.partial").exists()


def test_links_in_an_unfinished_target_are_not_written_through(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    partial = tmp_path / "target.partial"
    for name, to in (
        ("model-00001-of-00003.safetensors", precious / "file"),
        (".convert.jsonl", precious / "file"),
        ("x", precious),
    ):
        partial.mkdir()
        (partial / name).symlink_to(to)
        with pytest.raises(UserError, match="is a link"):
            run(source, tmp_path / "target")
        shutil.rmtree(partial)
    for name in ("target.partial", "target"):
        (tmp_path / name).symlink_to(precious)
        with pytest.raises(UserError, match="is a link"):
            run(source, tmp_path / "target")
        (tmp_path / name).unlink()
    assert [path.name for path in precious.iterdir()] == ["file"] and (precious / "file").read_text() == "mine"


def test_a_file_that_shares_its_bytes_is_not_written_into(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target.partial").mkdir()
    os.link(source / "model-00001-of-00003.safetensors", tmp_path / "target.partial" / "model-00001-of-00003.safetensors")
    os.link(source / "tokenizer.json", tmp_path / "target.partial" / "tokenizer.json")
    before = {path.name: digest(path) for path in source.iterdir()}
    run(source, tmp_path / "target")
    assert {path.name: digest(path) for path in source.iterdir()} == before


@pytest.mark.parametrize("source_name", ["target.partial", "target.partial/inner", "target/inner"])
def test_a_source_that_the_target_would_overwrite(tmp_path: Path, dense: ModelConfig, source_name: str) -> None:
    folder = tmp_path / source_name
    write_source(folder, dense)
    before = {path.name: digest(path) for path in folder.iterdir()}
    with pytest.raises(UserError, match="inside"):
        run(folder, tmp_path / "target")
    assert {path.name: digest(path) for path in folder.iterdir()} == before


@pytest.mark.parametrize("target", ["", "..", "/"])
def test_targets_that_are_no_name(source: Path, target: str) -> None:
    with pytest.raises(UserError):
        run(source, Path(target))


def test_links_that_leave_the_source_are_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    led = {"notes.txt": tmp_path / "secret", "gone": tmp_path / "nowhere", "all": tmp_path / "folder", "loop": Path("loop")}
    for name, to in led.items():
        (source / name).symlink_to(to)
        with pytest.raises(UserError, match=f"links that lead out of it or to folders: {name}"):
            run(source, tmp_path / "target")
        (source / name).unlink()
    shutil.rmtree(tmp_path / "target.partial", ignore_errors=True)
    (source / "tokenizer.json").rename(source / "real.json")
    (source / "tokenizer.json").symlink_to("real.json")
    run(source, tmp_path / "target")
    assert not (tmp_path / "target" / "tokenizer.json").is_symlink()


def test_a_hub_cache_is_a_source_although_its_files_are_links(source: Path, dense: ModelConfig, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(source.iterdir()):
        blob = blobs / digest(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    run(snapshot, tmp_path / "from_cache")
    run(source, tmp_path / "from_folder")
    for path in (tmp_path / "from_folder").iterdir():
        assert (tmp_path / "from_cache" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(start(snapshot, dense)[f"{DOWN}.weight"], start(source, dense)[f"{DOWN}.weight"])
