"""`convert method=gptq`: calibration data, mistakes, and llmcompressor itself where its environment is (make setup-gptq)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from convert_sources import model, read_all, write_source
from transformers import AutoModelForCausalLM

from runner.__main__ import main
from runner.config.schema import Convention, PrecisionConfig
from runner.convert import calibration, gptq
from runner.convert.compare import audit_checkpoint, read_checkpoint
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import disk_tensors
from runner.models.tokenizer import byte_tokenizer
from runner.precision import codec
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat

PYTHON = gptq.ROOT / ".venv-gptq" / "bin" / "python"
needs_llmcompressor = pytest.mark.skipif(not PYTHON.is_file(), reason="no environment with llmcompressor: make setup-gptq")
SAMPLES = 24


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """GSM8K-like sums: text as unlike noise as calibration data is, so that inputs are correlated."""
    path = tmp_path / "train.jsonl"
    rows = [{"question": f"What is {i} + {7 * i}?", "answer": f"It is {i} + {7 * i} = {8 * i}.\n#### {8 * i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def convert(tmp_path: Path, data: Path | str | None, *overrides: str) -> int:
    given = [] if data is None else [f"calibration={data}"]
    small = [f"calibration_samples={SAMPLES}", "calibration_tokens=48"]
    source, target = f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}"
    return main(["convert", source, target, "method=gptq", *given, *small, *overrides])


# -- calibration data ---------------------------------------------------------------------------------------------------


def test_rows_become_the_tokens_of_their_text(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": "abc"},
        {"question": "1 + 1?", "answer": "2"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "never read: three samples are enough"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    found = calibration.read_tokens(path, tokenizer, 3, 100)
    assert [tokenizer.decode(tokens) for tokens in found] == ["abc", "1 + 1?\n2", "hiho"]
    assert [len(tokens) for tokens in calibration.read_tokens(path, tokenizer, 3, 2)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "no string `question` and `answer` among prompt"),
        ({"question": "x"}, "no string `answer` among question"),
        ({"text": 3}, "no string `text`"),
        ({"text": ""}, "an empty text"),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, row: dict[str, object], words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=words) as caught:
        calibration.read_tokens(path, byte_tokenizer(), 2, 8)
    assert f"{path}:2" in str(caught.value)


def test_too_few_samples_are_not_made_do_with(data: Path) -> None:
    with pytest.raises(UserError, match="holds 40 samples, 41 are asked for") as caught:
        calibration.read_tokens(data, byte_tokenizer(), 41, 8)
    assert caught.value.fix == "convert.calibration_samples=40"


def test_files_and_hub_ids() -> None:
    assert all(calibration.is_file(name) for name in ("data.jsonl", "./data", "~/data", "/data/x"))
    assert not calibration.is_file("openai/gsm8k:main")
    assert calibration.hub_dataset("openai/gsm8k:main") == ("openai/gsm8k", "main")
    assert calibration.hub_dataset("openai/gsm8k") == ("openai/gsm8k", None)


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gptq_python=nowhere/python"], "make setup-gptq"),
        (["gptq_python={here}"], "cannot import llmcompressor"),
        (["format=fp8"], "method=gptq writes int4 and int8, not fp8"),
        (["damping=0"], "convert.damping"),
        (["calibration_samples=0"], "convert.calibration_samples"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    tmp_path: Path, data: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "source", model("qwen3"))
    assert convert(tmp_path, data, *(override.format(here=sys.executable) for override in overrides)) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"source", "train.jsonl"}


@pytest.mark.slow
@needs_llmcompressor
def test_calibration_data_must_be_given_and_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "source", model("qwen3"))
    for data, words in ((None, "needs calibration data"), (tmp_path / "gone.jsonl", "cannot read"), ("no/such", "no/such")):
        assert convert(tmp_path, data) == 2
        assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


# -- llmcompressor ------------------------------------------------------------------------------------------------------

CASES = {
    "qwen3_exact_32": ("qwen3", 32, "exact"),
    "qwen3_moe_exact_32": ("qwen3_moe", 32, "exact"),
    "qwen3_moe_llmcompressor_16": ("qwen3_moe", 16, "llmcompressor"),
    "deepseek_kimi_channel": ("deepseek", -1, "kimi"),
}


@pytest.mark.slow
@needs_llmcompressor
@pytest.mark.parametrize(("family", "group", "convention"), CASES.values(), ids=CASES.keys())
def test_gptq_on_the_plans_grid_has_a_lower_output_error_than_round_to_nearest(
    tmp_path: Path, data: Path, family: str, group: int, convention: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = model(family)
    weights = write_source(tmp_path / "source", tiny)
    grid = [f"precision.group_size={group}", f"precision.convention={convention}"]
    assert convert(tmp_path, data, *grid) == 0
    assert f"GPTQ on {SAMPLES} samples" in capsys.readouterr().out
    tensor_format = TensorFormat.int4(group, Convention[convention])
    plan = PrecisionPlan.with_format(tiny, tensor_format, quantized_roles(tiny, PrecisionConfig(roles=None)))
    assert audit_checkpoint(plan, tmp_path / "target") == []
    found = {tensor.name: tensor for tensor in read_checkpoint(tmp_path / "target")}
    changed = 0
    for name, weight in weights.items():
        if plan.tensors[name].quantized:  # the scales are round to nearest's, the integers are not
            nearest = codec.encode(name, weight, tensor_format)
            assert torch.equal(codec.scales_of(found[name]).scale, codec.scales_of(nearest).scale), name
            changed += int((codec.integers(found[name], tensor_format) != codec.integers(nearest, tensor_format)).sum())
        else:
            assert torch.equal(found[name].parts[name], weight), name
    assert changed > 0
    samples = calibration.read_tokens(data, byte_tokenizer(), SAMPLES, 48)
    gptq_error, nearest_error = (
        mlp_output_error(tmp_path / "source", tiny.family, samples, effective)
        for effective in (
            {name: codec.decode(found[name], tensor_format) for name in plan.quantized},
            {name: codec.quantize_dequantize(weights[name], tensor_format)[0] for name in plan.quantized},
        )
    )
    print(f"{family} group {group} {convention}: mlp output error {gptq_error / nearest_error:.3f} x round to nearest")
    assert gptq_error < nearest_error


def mlp_output_error(source: Path, family: str, samples: list[list[int]], effective: dict[str, torch.Tensor]) -> float:
    """Squared error of the outputs of all mlps with these weights, on the inputs they have in the bf16 model."""
    built = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager").eval()
    quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, attn_implementation="eager").eval()
    config = model(family)
    for name, view in disk_tensors(family_of(config), config, quantized.state_dict().items()):
        if name in effective:
            view.copy_(effective[name])
    total = 0.0
    for layer, other in zip(built.model.layers, quantized.model.layers, strict=True):

        def compare(module: torch.nn.Module, args: tuple, output: torch.Tensor, other=other) -> None:  # type: ignore[no-untyped-def]
            nonlocal total
            total += float((output.float() - other.mlp(*args).float()).square().sum())

        layer.mlp.register_forward_hook(compare)
    with torch.no_grad():
        for tokens in samples:
            built(torch.tensor([tokens]))
    return total


@pytest.mark.slow
@needs_llmcompressor
def test_int8_and_chosen_roles(tmp_path: Path, data: Path) -> None:
    tiny = model("qwen3_moe")
    weights = write_source(tmp_path / "source", tiny)
    wanted = ["format=int8", "precision.convention=llmcompressor", "precision.roles=[attention]", "precision.group_size=64"]
    assert convert(tmp_path, data, *wanted) == 0
    names = read_all(tmp_path / "target")
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    assert not any("experts" in name and name.endswith("packed") for name in names)
    assert torch.equal(names["model.layers.0.mlp.gate.weight"], weights["model.layers.0.mlp.gate.weight"])


@pytest.mark.slow
@needs_llmcompressor
def test_a_killed_assembly_keeps_the_calibration_and_a_failed_check_publishes_nothing(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "source", model("qwen3"))
    monkeypatch.setattr(gptq, "audit_checkpoint", lambda plan, folder: ["group_size run 32, stored 64"])
    assert convert(tmp_path, data) == 2
    assert "group_size run 32, stored 64" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
    monkeypatch.undo()
    monkeypatch.setattr(gptq, "_run_driver", None)  # not started again: its integers are there
    assert convert(tmp_path, data) == 0
    assert not (tmp_path / "target" / gptq.WORK).exists()
    assert not (tmp_path / "target.partial").exists()


@pytest.mark.slow
@needs_llmcompressor
def test_damping_is_applied(tmp_path: Path, data: Path) -> None:
    """A Hessian that is all damping knows no correlation, so nothing is fed back and the integers are round to nearest's, up to
    quotients that llmcompressor does not round to bf16 first (half a percent of random weights)."""
    tiny = model("qwen3")
    weights = write_source(tmp_path / "source", tiny)
    assert convert(tmp_path, data, "damping=1e6", "precision.group_size=32") == 0
    grid = TensorFormat.int4(32, Convention.exact)
    plan = PrecisionPlan.with_format(tiny, grid, quantized_roles(tiny, PrecisionConfig(roles=None)))
    for exported in read_checkpoint(tmp_path / "target"):
        if plan.tensors[exported.name].quantized:
            nearest = codec.integers(codec.encode(exported.name, weights[exported.name], grid), grid)
            assert (codec.integers(exported, grid) != nearest).float().mean() < 0.01, exported.name


@pytest.mark.slow
@needs_llmcompressor
def test_rows_of_a_dataset_arrive_as_jsonl(tmp_path: Path, data: Path) -> None:
    """As from the hub: `datasets` reads a folder by the same call as a hub id."""
    request = {"id": str(data.parent), "config": None, "split": "train", "count": 3, "path": str(tmp_path / "rows.jsonl")}
    with gptq._driver(PYTHON, "rows", request, tmp_path) as events:
        assert [event["event"] for event in events] == ["done"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in data.read_text().splitlines()[:3]]
