"""The converter: bytes, index and config, resume, atomicity and memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from convert_sources import (
    INT4,
    assert_same,
    default_roles,
    edit_config,
    model,
    read_all,
    refused,
    run,
    snapshot,
    write_shards,
    write_source,
)
from safetensors.torch import load_file

from runner.config.schema import Convention
from runner.convert import engine
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import save_config
from runner.precision import codec
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

FORMATS = {
    "int4_exact": INT4,
    "int4_kimi": TensorFormat.int4(16, Convention.kimi),
    "int4_llmcompressor_channel": TensorFormat.int4(-1, Convention.llmcompressor),
    "int8": TensorFormat.int8(64, Convention.llmcompressor),
    "fp8_block": TensorFormat.fp8("block"),
    "fp8_channel": TensorFormat.fp8("channel"),
    "fp8_tensor": TensorFormat.fp8("tensor"),
    "mxfp4": TensorFormat.mxfp4(),
    "nvfp4": TensorFormat.nvfp4(),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source", model("qwen3"))
    return tmp_path / "source"


@pytest.mark.parametrize("tensor_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek"])
def test_every_tensor_is_what_encode_gives_and_comes_back(tmp_path: Path, family: str, tensor_format: TensorFormat) -> None:
    config = model(family)
    weights = write_source(tmp_path / "source", config)
    before = snapshot(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "target", tensor_format)
    assert snapshot(tmp_path / "source") == before
    written = read_all(tmp_path / "target")
    plan = PrecisionPlan.with_format(config, tensor_format, default_roles(config))
    expected: dict[str, torch.Tensor] = {}
    effective: dict[str, torch.Tensor] = {}
    for exported in codec.encode_all(weights.items(), plan):
        name = exported.name
        expected |= exported.parts
        effective[name] = codec.decode(exported, tensor_format) if plan.tensors[name].quantized else weights[name]
    assert_same(written, expected)
    run(tmp_path / "target", tmp_path / "back", TensorFormat.bf16())
    assert_same(read_all(tmp_path / "back"), effective)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_index_config_and_other_files(tmp_path: Path) -> None:
    config = model("qwen3_moe")
    source, target = tmp_path / "source", tmp_path / "target"
    write_source(source, config)
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    report = run(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    total = 0
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(target / shard)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == shard}
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    quantization = json.loads((target / "config.json").read_text())["quantization_config"]
    assert quantization == report.quantization_config
    plan = PrecisionPlan.with_format(config, INT4, default_roles(config))
    assert PrecisionPlan.from_quantization_config(config, quantization).differences(plan) == []
    assert (target / "extra" / "note.txt").read_text() == "kept"
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    expected = set(snapshot(source))
    assert set(snapshot(target)) == expected  # no journal is left
    count, before, after = report.layers["routed_expert: int4 group 32 exact"]
    assert count == 2 * 4 * 3 and before == count * 64 * 64 * 2 and after == count * (64 * 64 // 2 + 64 * 2 * 2 + 16)


def test_weights_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    """Engines that read every *.safetensors would take bf16 leftovers for the target's weights."""
    weights = write_source(tmp_path / "source", model("qwen3"), shards=3)
    write_shards(tmp_path / "source", weights, 2)  # the three files stay
    report = run(tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert any("3 safetensors files that the index does not name were left out" in note for note in report.notes)


def test_a_single_file_checkpoint_and_one_worker(tmp_path: Path) -> None:
    config = model("qwen3", tied_embeddings=True)
    write_source(tmp_path / "source", config, shards=1)
    run(tmp_path / "source", tmp_path / "one", workers=1)
    run(tmp_path / "source", tmp_path / "four", workers=4)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    one, four = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "four"))
    assert one == four


def test_row_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Big weights go through in blocks of rows: same bytes, also where the last block is cut."""
    config = model("qwen3", ffn_size=320, num_layers=1)
    write_source(tmp_path / "source", config, shards=1)
    for name, tensor_format in FORMATS.items():
        run(tmp_path / "source", tmp_path / f"{name}_whole", tensor_format)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "BLOCK_BYTES", 1)  # 128 rows at a time
            run(tmp_path / "source", tmp_path / f"{name}_blocks", tensor_format)
        assert one_file(tmp_path / f"{name}_whole") == one_file(tmp_path / f"{name}_blocks"), name
        run(tmp_path / f"{name}_whole", tmp_path / f"{name}_back", TensorFormat.bf16())
        with monkeypatch.context() as patch:
            patch.setattr(engine, "BLOCK_BYTES", 1)
            run(tmp_path / f"{name}_whole", tmp_path / f"{name}_back_blocks", TensorFormat.bf16())
        assert one_file(tmp_path / f"{name}_back") == one_file(tmp_path / f"{name}_back_blocks"), name


def one_file(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_quantized_parts_in_different_shards_come_back(tmp_path: Path) -> None:
    config = model("qwen3_moe")
    write_source(tmp_path / "source", config)
    run(tmp_path / "source", tmp_path / "int4")
    run(tmp_path / "int4", tmp_path / "back", TensorFormat.bf16())
    tensors = read_all(tmp_path / "int4")
    for path in (tmp_path / "int4").glob("*.safetensors"):
        path.unlink()
    scattered = dict(sorted(tensors.items(), key=lambda item: hash(item[0].rpartition(".")[2]) % 5))
    write_shards(tmp_path / "int4", scattered, 4)
    run(tmp_path / "int4", tmp_path / "again", TensorFormat.bf16())
    assert_same(read_all(tmp_path / "again"), read_all(tmp_path / "back"))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_nvfp4_weights_that_engines_fuse_share_a_global_scale_across_shards(tmp_path: Path, family: str) -> None:
    """SGLang refuses other checkpoints. Every weight lies in another shard than the ones before and after it."""
    config = model(family)
    weights = write_source(tmp_path / "source", config)
    write_shards(tmp_path / "source", {name: weights[name] for name in [*list(weights)[::2], *list(weights)[1::2]]}, 2)
    report = run(tmp_path / "source", tmp_path / "target", TensorFormat.nvfp4())
    written, plan = read_all(tmp_path / "target"), PrecisionPlan.with_format(config, TensorFormat.nvfp4(), default_roles(config))
    assert_same(written, {name: part for e in codec.encode_all(weights.items(), plan) for name, part in e.parts.items()})
    scales = {name.removesuffix(".weight_global_scale"): float(s) for name, s in written.items() if name.endswith("global_scale")}
    pairs = [(scale, scales[name.replace("gate_proj", "up_proj")]) for name, scale in scales.items() if "gate_proj" in name]
    assert pairs and all(gate == up for gate, up in pairs) and len({gate for gate, _ in pairs}) > 1
    assert report.read_bytes == sum(tensor.numel() * 2 for tensor in weights.values())  # what is looked at twice counts once
    warned = [note for note in report.notes if "transformers 5.19" in note]
    assert len(warned) == (family == "qwen3_moe")


# -- a kill ---------------------------------------------------------------------------------------------------------


def test_a_failed_conversion_resumes_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model("qwen3_moe")
    source, target = tmp_path / "source", tmp_path / "target"
    write_source(source, config, shards=3)
    run(source, tmp_path / "whole")
    real, calls = engine._convert_shard, []

    def dies_at_the_second(*args: object) -> int:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_convert_shard", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(source, target)
    partial = tmp_path / "target.partial"
    assert not target.exists() and partial.is_dir()
    assert not (partial / "config.json").exists() and not (partial / "model.safetensors.index.json").exists()
    first = next(partial.glob("*.safetensors"))
    stamp = first.stat().st_mtime_ns
    report = run(source, target)
    assert report.resumed == 1 and not partial.exists()
    assert (target / first.name).stat().st_mtime_ns == stamp  # not converted a second time
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_no_checkpoint_and_resumes(tmp_path: Path) -> None:
    config = model("qwen3_moe", num_experts=32, num_layers=6)
    source, target = tmp_path / "source", tmp_path / "target"
    write_source(source, config, shards=6)
    program = (
        "import sys; from pathlib import Path; from convert_sources import run; print('go', flush=True);"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), workers=1)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(target)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout is not None and process.stdout.readline()
    journal = tmp_path / "target.partial" / ".convert.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if journal.exists() and journal.read_text().count("\n") >= 3:  # the identity and two shards
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if target.exists():
        pytest.skip("the conversion was faster than the kill")
    assert not (tmp_path / "target.partial" / "config.json").exists()
    with (tmp_path / "target.partial" / ".convert.jsonl").open("a") as file:
        file.write('{"shard": "model-0')  # the entry that was being written
    report = run(source, target)
    assert report.resumed >= 2
    run(source, tmp_path / "whole")
    assert_same(read_all(target), read_all(tmp_path / "whole"))


def test_the_rest_of_another_conversion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source", model("qwen3"))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", tmp_path / "target")
    with pytest.raises(UserError, match="rest of another conversion"):
        run(tmp_path / "source", tmp_path / "target", TensorFormat.int4(64, Convention.exact))
    assert run(tmp_path / "source", tmp_path / "target").resumed == 3


def test_a_partial_folder_without_a_finished_shard_blocks_nothing(source: Path, tmp_path: Path) -> None:
    weights = read_all(source)
    weights["model.embed_tokens.weight"][0, 0] = float("nan")
    write_shards(source, weights, 3)
    refused(source, tmp_path, "embed_tokens")
    weights["model.embed_tokens.weight"][0, 0] = 0.0
    write_shards(source, weights, 3)
    assert run(source, tmp_path / "target", TensorFormat.fp8()).resumed == 0


# -- foreign checkpoints --------------------------------------------------------------------------------------------


def test_fp8_checkpoint_that_lists_no_exceptions(tmp_path: Path) -> None:
    """DeepSeek-style FP8: modules_to_not_convert is absent, yet router and head lie in bf16; what lies there counts."""
    config = model("deepseek")
    weights = write_source(tmp_path / "source", config)
    run(tmp_path / "source", tmp_path / "fp8", TensorFormat.fp8("block"))
    path = tmp_path / "fp8" / "config.json"
    raw = json.loads(path.read_text())
    del raw["quantization_config"]["modules_to_not_convert"]
    path.write_text(json.dumps(raw))
    report = run(tmp_path / "fp8", tmp_path / "back", TensorFormat.bf16())
    assert "lie in bf16" in report.notes[0]
    back = read_all(tmp_path / "back")
    assert torch.equal(back["model.layers.1.mlp.gate.weight"], weights["model.layers.1.mlp.gate.weight"])
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    exported = ExportedTensor(name, "fp8", codec.encode(name, weights[name], TensorFormat.fp8()).parts)
    assert torch.equal(back[name], codec.decode(exported, TensorFormat.fp8()))


@pytest.mark.parametrize("block_bytes", [1, 4 << 20])
def test_fp8_blocks_by_their_other_name_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """compressed-tensors writes block scales as .weight_scale; a weight larger than a row block must find its own."""
    config = model("qwen3", ffn_size=320, num_layers=1)
    write_source(tmp_path / "source", config)
    run(tmp_path / "source", tmp_path / "fp8", TensorFormat.fp8())
    run(tmp_path / "fp8", tmp_path / "expected", TensorFormat.bf16())
    renamed = {name.replace("weight_scale_inv", "weight_scale"): part for name, part in read_all(tmp_path / "fp8").items()}
    write_shards(tmp_path / "fp8", renamed, 3)
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*self_attn.*"]}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    edit_config(tmp_path / "fp8", quantization_config=quantization | {"config_groups": {"group_0": group}})
    monkeypatch.setattr(engine, "BLOCK_BYTES", block_bytes)
    run(tmp_path / "fp8", tmp_path / "back", TensorFormat.bf16())
    assert_same(read_all(tmp_path / "back"), read_all(tmp_path / "expected"))


def test_an_asymmetric_int4_checkpoint_comes_back(source: Path, tmp_path: Path) -> None:
    """As llm-compressor's W4A16_ASYM: compressed-tensors' own integers, scales and zero points, and what it reads there."""
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors, expected = read_all(source), {}
    names = [name for name in tensors if ".mlp." in name]
    for name in names:
        weight = tensors.pop(name) + 0.01
        grouped = weight.unflatten(1, (-1, 32))
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}, scheme)
        assert zero_point.abs().max() > 0
        expected[name] = compressor.decompress(dict(state), scheme)["weight"]
        tensors |= {name.replace("weight", part): value.data for part, value in state.items()}
    write_shards(source, tensors, 3)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    edit_config(source, quantization_config=quantization | {"ignore": ["lm_head", "re:.*self_attn.*"]})
    run(source, tmp_path / "bf16", TensorFormat.bf16())
    back = read_all(tmp_path / "bf16")
    assert_same({name: back[name] for name in names}, expected)


def test_missing_scale_of_a_quantized_weight(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "int4")
    tensors = read_all(tmp_path / "int4")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    write_shards(tmp_path / "int4", tensors, 3)
    refused(tmp_path / "int4", tmp_path, "layers.0.mlp.up_proj.weight.*weight_scale", TensorFormat.bf16())


def test_fp16_and_fp32_sources_are_rounded_once(tmp_path: Path) -> None:
    config = model("qwen3")
    weights = write_source(tmp_path / "source", config)
    exact = {name: tensor.float() * (1 + 2**-12) for name, tensor in weights.items()}
    write_shards(tmp_path / "source", exact, 3)
    run(tmp_path / "source", tmp_path / "target")
    written = read_all(tmp_path / "target")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = codec.encode(name, exact[name].to(torch.bfloat16), INT4)
    for part, tensor in expected.parts.items():
        assert torch.equal(written[part], tensor)
    assert torch.equal(written["model.embed_tokens.weight"], exact["model.embed_tokens.weight"])


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_peak_memory_stays_under_twice_the_largest_shard(tmp_path: Path) -> None:
    """Two shards of 100 MB, few huge weights in each, in a process of its own; growth over the imported libraries."""
    config = model("qwen3", num_layers=2, hidden_size=1024, ffn_size=16384)
    source = tmp_path / "source"
    source.mkdir()
    save_config(config, source)
    pattern = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    table = family_of(config).parameters(config)
    write_shards(source, {p.name: pattern[: math.prod(p.shape)].reshape(p.shape).clone() for p in table}, 2)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    program = (
        "import sys; from pathlib import Path; from convert_sources import *; import runner.precision.kernels.cpu;"
        "status = lambda key: int(Path('/proc/self/status').read_text().split(key)[1].split()[0]) * 1024;"
        "back = lambda source: convert(source, Path(f'{source}_back'), TensorFormat.bf16(), default_roles, workers=2);"
        "run(Path(sys.argv[1]), Path(sys.argv[2]));"
        "back(Path(sys.argv[2]));"
        "before = status('VmRSS:');"
        "run(Path(sys.argv[3]), Path(sys.argv[4]), workers=2);"
        "print(status('VmHWM:') - before);"
        "Path('/proc/self/clear_refs').write_text('5');"
        "before = status('VmRSS:');"
        "back(Path(sys.argv[4]));"
        "print(status('VmHWM:') - before)"
    )
    # warms everything up first; its matrices are just large enough for the compiled kernels, which compile here if ever
    write_source(tmp_path / "small", model("qwen3", hidden_size=128, ffn_size=256))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / name) for name in ("small", "small4", "source", "target"))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert result.returncode == 0, result.stderr
    there, back = (int(line) for line in result.stdout.split())
    assert 0 < there < 2 * largest and 0 < back < 2 * largest  # on the way back the target's shards are the large ones
