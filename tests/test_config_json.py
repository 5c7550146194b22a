"""config.json from outside: every key absent, null, or anything else is read as transformers reads it, or refused in words."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import model, read_all, write_shards, write_source
from safetensors.torch import save_file
from transformers import AutoConfig

from runner.__main__ import main
from runner.config.schema import Convention, ModelConfig, PrecisionConfig, Role
from runner.convert.engine import Report, convert
from runner.convert.source import model_of, open_source
from runner.errors import UserError
from runner.models import FAMILIES, register_architectures
from runner.models.build import build_model, load_tokenizer, save_config
from runner.models.config_file import family_fields, read_json
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.quantization_config import nested_quantization_config
from runner.precision.tensor_format import TensorFormat

INT4 = TensorFormat.int4(32, Convention.exact)
BF16 = TensorFormat.bf16()
KINDS = ["qwen3", "qwen3_moe", "deepseek"]


def default_roles(config: ModelConfig) -> frozenset[Role]:
    return quantized_roles(config, PrecisionConfig(roles=None))


def run(source: Path, target: Path, tensor_format: TensorFormat = INT4) -> Report:
    return convert(source, target, tensor_format, default_roles, workers=1)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source", model("qwen3"))
    return tmp_path / "source"


# -- read right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [
    lambda c: c.update(quantization_config=None),
    lambda c: c.update(compression_config=None),
    lambda c: c.update(rope_parameters={"rope_type": "default"}),
    lambda c: c.update(rope_parameters=None, rope_scaling=None),
    lambda c: [c.pop("rope_parameters"), c.pop("rope_theta", None)],
    lambda c: [c.pop(key, None) for key in ("initializer_range", "rms_norm_eps", "tie_word_embeddings", "attention_bias")],
    lambda c: c.update(tie_word_embeddings=None, attention_bias=None, use_sliding_window=None, hidden_act=None),
])  # fmt: skip
def test_null_and_missing_keys(source: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_config(source, edit)
    run(source, tmp_path / "int4")
    config = read_json(tmp_path / "int4" / "config.json")
    assert nested_quantization_config(config) is not None
    run(tmp_path / "int4", tmp_path / "back", BF16)
    assert nested_quantization_config(read_json(tmp_path / "back" / "config.json")) is None
    assert main(["audit", str(source), str(source)]) == 0


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "deepseek", "mimo", "qwen3_vl"])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """A key that is left out means what the class that builds the model takes for it."""
    register_architectures()
    names = {
        "head_dim": "head_dim",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_context_tokens",
        "initializer_range": "initializer_range",
        "rms_norm_eps": "norm_eps",
        "num_experts_per_tok": "experts_top_k",
        "routed_scaling_factor": "routed_scaling_factor",
        "first_k_dense_replace": "num_dense_layers",
        "tie_word_embeddings": "tied_embeddings",
        "attention_bias": "attention_bias",
    }
    family = FAMILIES[kind]
    tiny = model("deepseek" if kind == "deepseek" else "qwen3_moe" if kind == "qwen3_moe" else "qwen3")
    tiny = replace(tiny, family=kind, num_experts=tiny.num_experts and 64, vision=kind == "qwen3_vl")
    full = family.hf_config(tiny)
    holder = full.get("text_config", full)
    for key in [*names, "rope_theta", "rope_parameters"]:
        holder.pop(key, None)
    full.pop("tie_word_embeddings", None)
    if kind == "mimo":
        holder["attention_bias"] = True  # of the family, not a default
    read = family.from_hf_config(copy.deepcopy(full), "x")
    built = AutoConfig.for_model(**copy.deepcopy(full))
    built = getattr(built, "text_config", built)
    assert read["rope_theta"] == built.rope_parameters["rope_theta"]
    compared = [key for key in names if hasattr(built, key) and not (kind == "deepseek" and key == "head_dim")]
    assert len(compared) >= 6
    for key in compared:
        theirs = getattr(built, key)
        if key == "head_dim" and theirs is None:
            theirs = built.hidden_size // built.num_attention_heads
        assert read[names[key]] == theirs or key == "attention_bias", key


def test_null_key_value_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    config = model("qwen3", num_kv_heads=4)
    write_source(tmp_path / "source", config)
    edit_config(tmp_path / "source", lambda c: c.update(num_key_value_heads=None))
    assert model_of(open_source(tmp_path / "source")).num_kv_heads == 4


@pytest.mark.parametrize("holder", ["text_config", "compression_config"])
def test_a_quantization_config_elsewhere(source: Path, tmp_path: Path, holder: str) -> None:
    """vLLM and older compressed-tensors put it there: once read as bf16 by Megatron's ranks and by the converter."""
    config = model("qwen3")
    if holder == "text_config":  # only a model of several parts has one
        config = replace(config, family="qwen3_vl", vision=True)
        shutil.rmtree(source)
        write_source(source, config)
    run(source, tmp_path / "int4")
    expected = build_model(replace(config, hf_checkpoint=str(tmp_path / "int4")), dtype=torch.bfloat16, seed=1).state_dict()

    def move(raw: dict[str, Any]) -> None:
        quantization = raw.pop("quantization_config")
        if holder == "text_config":
            raw["text_config"]["quantization_config"] = quantization
        else:
            raw[holder] = quantization

    edit_config(tmp_path / "int4", move)
    with pytest.raises(UserError, match="already quantized"):
        run(tmp_path / "int4", tmp_path / "again")
    run(tmp_path / "int4", tmp_path / "back", BF16)
    back = read_json(tmp_path / "back" / "config.json")
    assert nested_quantization_config(back) is None and "quantization_config" not in json.dumps(back)
    started = build_model(replace(config, hf_checkpoint=str(tmp_path / "int4")), dtype=torch.bfloat16, seed=1).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "key",
    ["rms_norm_eps", "initializer_range", "tie_word_embeddings", "max_position_embeddings", "hidden_act", "attention_bias"]
    + ["use_sliding_window", "rope_theta", "rope_scaling", "model_type", "layer_types", "use_cache", "eos_token_id"],
)
def test_a_run_starts_where_convert_reads_a_null(source: Path, tmp_path: Path, key: str) -> None:
    """transformers' classes refuse null for most keys; the model is the one with the key left out."""
    shutil.copytree(source, tmp_path / "without")
    edit_config(tmp_path / "without", lambda c: c.pop(key, None))
    edit_config(source, lambda c: c.update({key: None}))
    run(source, tmp_path / "int4")
    cfgs = [model_of(open_source(folder)) for folder in (tmp_path / "without", source)]
    without, null = (build_model(cfg, dtype=torch.bfloat16, seed=1) for cfg in cfgs)
    assert null.config.to_dict() == without.config.to_dict() | {"_name_or_path": null.config._name_or_path}
    assert all(torch.equal(a, b) for a, b in zip(null.state_dict().values(), without.state_dict().values(), strict=True))
    save_config(cfgs[1], tmp_path / "saved")
    assert load_tokenizer(replace(cfgs[1], hf_checkpoint=str(tmp_path / "saved")))("1+1=").input_ids


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 2, ["full_attention", "linear_attention"]])
def test_layers_of_another_kind_are_refused(source: Path, tmp_path: Path, kinds: Any) -> None:
    edit_config(source, lambda c: c.update(layer_types=["full_attention"] * 2))
    assert model_of(open_source(source)).num_layers == 2
    edit_config(source, lambda c: c.update(layer_types=kinds))
    with pytest.raises(UserError, match="layer_types"):
        run(source, tmp_path / "int4")


def test_a_quantization_config_in_a_part_that_the_model_has_not(source: Path, tmp_path: Path) -> None:
    """Read all the same; with anything else in that part it is no config.json of this model."""
    run(source, tmp_path / "int4")
    config = replace(model("qwen3"), hf_checkpoint=str(tmp_path / "int4"))
    expected = build_model(config, dtype=torch.bfloat16, seed=1).state_dict()
    edit_config(tmp_path / "int4", lambda c: c.update(text_config={"quantization_config": c.pop("quantization_config")}))
    run(tmp_path / "int4", tmp_path / "back", BF16)
    started = build_model(config, dtype=torch.bfloat16, seed=1).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in expected.items())
    edit_config(tmp_path / "int4", lambda c: c["text_config"].update(hidden_size=64))
    with pytest.raises(UserError, match="builds no model from config.json"):
        build_model(config, dtype=torch.bfloat16, seed=1)


def test_what_transformers_makes_of_a_config_is_no_traceback(source: Path) -> None:
    edit_config(source, lambda c: c.update(text_config={}, layer_types=5))
    with pytest.raises(UserError, match="is not one of qwen3"):
        build_model(replace(model("qwen3"), hf_checkpoint=str(source)), dtype=torch.bfloat16, seed=1)


def test_two_quantization_configs_that_differ(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int4")
    edit_config(tmp_path / "int4", lambda c: c.update(text_config={"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="two quantization_configs that differ"):
        run(tmp_path / "int4", tmp_path / "back", BF16)


@pytest.mark.parametrize("count", [1, 3])
def test_numbered_files_without_an_index(source: Path, tmp_path: Path, count: int) -> None:
    weights = read_all(source)
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    for number in range(count):
        part = {name: weights[name] for name in sorted(weights)[number::count]}
        save_file(part, source / f"model-{number + 1:05d}-of-{count:05d}.safetensors", {"format": "pt"})
    config = replace(model("qwen3"), hf_checkpoint=str(source))
    started = build_model(config, dtype=torch.bfloat16, seed=1).state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in weights.items())
    report = run(source, tmp_path / "int4")
    assert any("the target gets one" in note for note in report.notes)
    index = read_json(tmp_path / "int4" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(read_all(tmp_path / "int4"))
    if count > 1:
        (source / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(UserError, match="1 of 3 shards .* missing: model-00002"):
            run(source, tmp_path / "again")


def test_other_forms_of_the_weights_are_left_out(source: Path, tmp_path: Path) -> None:
    """In an INT4 folder they would be the bf16 weights, which some loaders prefer."""
    others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "original/consolidated.00.pth", "original/params.json"]
    others += ["onnx/model.onnx", "gguf/model.gguf", "sub/model.safetensors", "optimizer.pt", "tf_model.h5"]
    for name in others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"weights")
    report = run(source, tmp_path / "int4")
    assert not any((tmp_path / "int4" / name).exists() for name in others)
    assert (tmp_path / "int4" / "tokenizer.json").is_file()
    assert any(f"{len(others)} files with weights in another form were left out" in note for note in report.notes)


def test_a_folder_with_pickled_weights_only(source: Path, tmp_path: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, source / "pytorch_model.bin")
    for opened in (
        lambda: run(source, tmp_path / "target"),
        lambda: build_model(replace(model("qwen3"), hf_checkpoint=str(source)), dtype=torch.bfloat16, seed=1),
    ):
        with pytest.raises(UserError, match=r"neither model.safetensors nor .*it has pytorch_model.bin"):
            opened()


def test_experts_fused_in_one_tensor(tmp_path: Path) -> None:
    config = model("qwen3_moe")
    weights = write_source(tmp_path / "source", config)
    fused = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(config.num_layers):
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(4, 128, 64, dtype=torch.bfloat16)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    write_shards(tmp_path / "source", fused, 3)
    for opened in (
        lambda: run(tmp_path / "source", tmp_path / "target"),
        lambda: build_model(replace(config, hf_checkpoint=str(tmp_path / "source")), dtype=torch.bfloat16, seed=1),
    ):
        with pytest.raises(UserError, match="lie fused in 3-D tensors, first model.layers.0.mlp.experts"):
            opened()


@pytest.mark.parametrize("tensor_format", [INT4, TensorFormat.fp8(), TensorFormat.mxfp4()])
def test_mixed_dtypes_of_a_written_folder_are_said(source: Path, tmp_path: Path, tensor_format: TensorFormat) -> None:
    assert not any("stay in" in note for note in run(source, tmp_path / "pure", tensor_format).notes)
    weights = {name: tensor.half() for name, tensor in read_all(source).items()}
    write_shards(source, weights, 3)
    report = run(source, tmp_path / "mixed", tensor_format)
    assert any("weights stay in float16, as the source has them" in note for note in report.notes)
    back = run(tmp_path / "mixed", tmp_path / "back", BF16)
    assert any("stay in float16, as the source has them, beside bfloat16" in note for note in back.notes)


# -- or refused -----------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    *(None, True, "x", "", -1, 0, 1, 3, 10**9, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *([], [None], ["x"], [[]], {}, {"a": None}, {"rope_theta": "x"}, {"rope_theta": None}, "\ud800", "x" * 100_000),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON object."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_value(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def read_it(config: dict[str, Any]) -> None:
    """All that convert, audit and a run's start read of a config.json."""
    _, fields = family_fields(config, Path("folder"))
    own = {"hf_checkpoint": "folder", "toy_twin": "none"}
    PrecisionPlan.from_quantization_config(ModelConfig(**(own | fields)), nested_quantization_config(config)).summary()


@pytest.mark.parametrize("kind", [*KINDS, "mimo", "qwen3_vl"])
def test_any_value_at_any_key_is_read_or_refused(kind: str) -> None:
    tiny = model(kind if kind in KINDS else "qwen3")
    tiny = replace(tiny, family=kind, attention_bias=kind == "mimo", vision=kind == "qwen3_vl", qk_norm=kind != "mimo")
    formats = [INT4, TensorFormat.fp8()] if kind == "qwen3" else [INT4]
    refused = read = 0
    for tensor_format in formats:
        plan = PrecisionPlan.with_format(tiny, tensor_format, default_roles(tiny))
        config = FAMILIES[kind].hf_config(tiny) | {"quantization_config": plan.quantization_config()}
        config["quantization_config"] = json.loads(json.dumps(config["quantization_config"]))
        read_it(config)
        for path in places(config):
            for value in VALUES:
                try:
                    read_it(with_value(config, path, value))
                    read += 1
                except UserError as error:
                    assert error.problem and len(str(error)) < 2_000, (path, value)
                    refused += 1
    assert refused > 100 and read > 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_experts": 10**9}, "num_experts"),
        ({"num_hidden_layers": 1000, "num_experts": 10_000}, "more than any model has"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": None}, "has null as `num_hidden_layers`"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"architectures": None}, "unknown architecture"),
        ({"architectures": 5}, "must be a list of names"),
    ],
)
def test_numbers_beyond_all_limits(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Before anything is allocated: by convert, audit, the start of a run, and `run` before it imports torch."""
    config = model("qwen3_moe")
    write_source(tmp_path / "source", config)
    edit_config(tmp_path / "source", lambda c: c.update(changes))
    with pytest.raises(UserError, match=words):
        run(tmp_path / "source", tmp_path / "target")
    for argv in (
        ["convert", f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}"],
        ["audit", str(tmp_path / "source"), str(tmp_path / "source")],
        ["model=tiny_moe", f"model.hf_checkpoint={tmp_path / 'source'}", f"outputs_dir={tmp_path / 'outputs'}"],
    ):
        assert main(argv) == 2
    with pytest.raises(UserError):
        build_model(replace(config, hf_checkpoint=str(tmp_path / "source")), dtype=torch.bfloat16, seed=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("\xff", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("", "is not JSON"),
        (" " * (17 << 20), "at most"),
        ("1" * 10_000, "is not JSON"),
    ],
)
def test_files_that_are_no_config(source: Path, tmp_path: Path, text: str, words: str) -> None:
    (source / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        run(source, tmp_path / "target")


def test_a_config_that_never_ends(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        run(source, tmp_path / "target")


@pytest.mark.timeout(200)  # a guard: unguarded, one of these takes longer than the universe is old
@pytest.mark.parametrize("pattern", [r"re:(a|a)*$", r"re:((\w+)+\.?)+X", r"re:(.*)*(.*)*(.*)*X", r"re:(\w*\.*)*\1Z"])
@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_a_pattern_that_never_ends(source: Path, tmp_path: Path, pattern: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read or refused, but not waited for."""
    from runner.precision import quantization_config

    monkeypatch.setattr(quantization_config, "MATCH_SECONDS", 0.5)
    run(source, tmp_path / "int4")

    def edit(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        if key == "ignore":
            quantization["ignore"].append(pattern)
        else:
            quantization["config_groups"]["group_0"]["targets"] = [pattern]

    edit_config(tmp_path / "int4", edit)
    assert main(["audit", str(tmp_path / "int4"), str(tmp_path / "int4")]) in (0, 1, 2)


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:*", "re:(?<a>x"])
def test_a_pattern_that_is_none(source: Path, tmp_path: Path, pattern: str) -> None:
    run(source, tmp_path / "int4")
    edit_config(tmp_path / "int4", lambda c: c["quantization_config"]["ignore"].append(pattern))
    with pytest.raises(UserError, match="is no pattern"):
        run(tmp_path / "int4", tmp_path / "back", BF16)


def test_a_size_that_the_model_group_does_not_have(tmp_path: Path) -> None:
    """Found in config.json, before a model of that size is built."""
    config = model("qwen3_moe")
    write_source(tmp_path / "source", config)
    other = replace(config, hf_checkpoint=str(tmp_path / "source"), experts_top_k=1)
    with pytest.raises(UserError, match="experts_top_k 2, the model group 1"):
        build_model(other, dtype=torch.bfloat16, seed=1)
    shutil.rmtree(tmp_path / "source")
