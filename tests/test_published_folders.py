"""Folders as Moonlight and Kimi-K2 are published: every verb reads them, and none runs the code that lies in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from convert_sources import model, write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from published_folders import BASE, NAMED, VOCAB, nothing_ran, overrides, published, ranks, with_planted_code, write_tokenizer
from tiny_models import BASE as BASE_MODEL

from runner.config.schema import Convention, ModelConfig, PrecisionConfig
from runner.convert.compare import audit_checkpoint
from runner.convert.engine import convert
from runner.convert.source import model_of, open_source
from runner.errors import UserError
from runner.models.build import build_model, disk_tensors, named_weights, save_config
from runner.models.draft_folder import draft_model
from runner.models.published import checkpoint_config
from runner.models.tiktoken_file import PATTERN, TiktokenTokenizer, other_pattern
from runner.models.tokenizer import byte_tokenizer, load_tokenizer
from runner.precision.plan import PrecisionPlan, quantized_roles
from runner.precision.tensor_format import TensorFormat
from runner.rollout.sglang.model_folder import write_model_folder
from runner.trainer.mtp import build_layers

KINDS = ("moonlight", "kimi")
# as the published tokenization_moonshot.py and tokenization_kimi.py have it, alternative by alternative
PUBLISHED = [
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""",
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
    r"""\s*[\r\n]+""",
    r"""\s+(?!\S)""",
    r"""\s+""",
]
TEXTS = [
    "",
    " ",
    "Hello there, the King's ring: 12345 + 34 = 12379\n\n  done.",
    "中文和the混合 text，你好\r\n\r\n\tx",
    "DON'T don't We'LL naïve Ǆungla ʰa ́e",
    "<|im_user|>the ring<|im_end|>[EOS]<|reserved_token_300|>",
    "a" * 1000 + " " * 300 + "b\u00a0\u2003c",
    "\u0000\ud7ff\U0001f600\U0001f468\u200d\U0001f469",
]


def reference() -> tiktoken.Encoding:
    """tiktoken with the published pattern and special tokens, put together as the published class does."""
    special = {NAMED.get(index, f"<|reserved_token_{index}|>"): index for index in range(BASE, BASE + 256)}
    return tiktoken.Encoding("published", pat_str="|".join(PUBLISHED), mergeable_ranks=ranks(), special_tokens=special)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TiktokenTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "moonlight"
    write_tokenizer(folder, "tokenization_moonshot")
    return TiktokenTokenizer.from_pretrained(str(folder), embeddings=VOCAB)


def test_the_pattern_is_the_published_one() -> None:
    assert "|".join(PUBLISHED) == PATTERN


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens(tokenizer: TiktokenTokenizer, text: str) -> None:
    expected = reference().encode(text, allowed_special="all")
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert tokenizer([text, "x", text]).input_ids == [expected, reference().encode("x"), expected]
    assert tokenizer.decode(expected) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == expected
    plain = reference().encode_ordinary(text)
    assert tokenizer(text, split_special_tokens=True).input_ids == plain


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the in's 12\n\r\t中文ABab ")), max_size=60
    )
)
def test_ids_of_any_text_are_tiktokens(tokenizer: TiktokenTokenizer, text: str) -> None:
    assert tokenizer(text).input_ids == reference().encode(text, allowed_special="all")


def test_long_texts_are_cut_where_the_published_code_cuts(tokenizer: TiktokenTokenizer) -> None:
    """After 25,000 characters without a space, or of spaces, and after 400,000."""
    a, spaces = reference().encode("a" * 25_000), reference().encode(" " * 25_000)
    assert tokenizer("a" * 50_001).input_ids == [*a, *a, *reference().encode("a")]
    assert tokenizer(" " * 25_001).input_ids == [*spaces, *reference().encode(" ")]
    long = "the ring " * 50_000
    assert tokenizer(long).input_ids == reference().encode(long[:400_000]) + reference().encode(long[400_000:])


def test_special_tokens_come_from_the_config(tokenizer: TiktokenTokenizer) -> None:
    assert len(tokenizer) == VOCAB == tokenizer.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BASE, BASE + 1, BASE + 251)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == BASE + 2
    ids = [BASE + 3, *tokenizer("the").input_ids, BASE + 2, BASE + 1]
    assert tokenizer.decode(ids) == "<|im_user|>the<|im_end|>[EOS]" and tokenizer.decode(ids, skip_special_tokens=True) == "the"
    assert tokenizer.decode([255, 10**6, 0]).endswith("!")  # a broken character, an id without a token
    said = tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False)
    assert said == "<|im_user|>12<|im_end|>"


def test_reserved_ids_end_where_embeddings_do(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "folder", "tokenization_kimi")
    names = {"config": ModelConfig(hf_checkpoint=str(tmp_path / "folder"), vocab_size=VOCAB - 4, name="x")}
    assert len(load_tokenizer(names["config"])) == VOCAB - 4
    with pytest.raises(UserError, match=f"ids up to {BASE + 251}, the model has {BASE + 100}"):
        load_tokenizer(ModelConfig(hf_checkpoint=str(tmp_path / "folder"), vocab_size=BASE + 100, name="x"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ranks: ranks[1:], "256 single bytes|not numbered"),
        (lambda ranks: [*ranks, b"!! 7"], "line 279 of tiktoken.model"),
        (lambda ranks: [*ranks, b"YWFhYQ== 999"], "not numbered from 0"),
        (lambda ranks: [*ranks, b"YWFhYQ== 278"], r"special token '\[BOS\]' has id 278"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    write_tokenizer(tmp_path / "folder", "tokenization_kimi")
    path = tmp_path / "folder" / "tiktoken.model"
    path.write_bytes(b"\n".join(spoil(path.read_bytes().splitlines())))  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelConfig(hf_checkpoint=str(tmp_path / "folder"), vocab_size=VOCAB, name="x"))


def test_a_tokenizer_that_only_its_own_code_reads_is_refused(tmp_path: Path) -> None:
    """transformers would make another one of its files, without the split pattern, and say nothing."""
    folder = tmp_path / "folder"
    write_tokenizer(folder, "tokenization_kimi")
    config, values = folder / "tokenizer_config.json", json.loads((folder / "tokenizer_config.json").read_text())
    named = ModelConfig(hf_checkpoint=str(folder), vocab_size=VOCAB, name="x")
    for changed, message in (
        ({"tokenizer_class": "OtherTokenizer"}, "it is class OtherTokenizer in tokenization_kimi.py"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": None}, "does not say how text is split"),
    ):
        config.write_text(json.dumps(values | changed))
        with pytest.raises(UserError, match=message):
            load_tokenizer(named)
    config.write_text(json.dumps(values))
    code = "raise RuntimeError\npat_str = '|'.join([r'[\\p{Han}]+', r'\\p{N}'])\n"
    (folder / "tokenization_kimi.py").write_text(code)
    with pytest.raises(UserError, match="another pattern than the published one"):
        load_tokenizer(named)
    joined = ",\n".join(f'r"""{part}"""' for part in PUBLISHED)
    (folder / "tokenization_kimi.py").write_text(f"class A:\n    pat_str = '|'.join(\n[{joined}])\nraise RuntimeError\n")
    assert len(load_tokenizer(named)) == VOCAB and other_pattern("this is no Python") is None
    assert nothing_ran(folder)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ModelConfig]:
    monkeypatch.chdir(tmp_path)
    return tmp_path / request.param, published(tmp_path / request.param, request.param)


def test_the_model_is_the_familys_own_class(folder: tuple[Path, ModelConfig]) -> None:
    path, model = folder
    built = build_model(model, dtype=torch.float32, seed=0)
    assert type(built).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    views = dict(disk_tensors(__import__("runner.models").models.family_of(model), model, named_weights(model, built)))
    stored = open_source(path)
    from runner.convert.reading import read_weight

    plan = PrecisionPlan.from_quantization_config(model, None)
    assert all(torch.equal(view, read_weight(stored, plan, name).float()) for name, view in views.items())
    rope = {"moonlight": "default", "kimi": "yarn"}[path.name]
    assert built.model.rotary_emb.rope_type == rope
    assert checkpoint_config(model).model_type == "deepseek_v3" and nothing_ran(path)


def test_convert_keeps_every_file_and_audit_reads_it(folder: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    path, model = folder
    grid = TensorFormat.int4(32, Convention.kimi)
    convert(path, tmp_path / "int4", grid, lambda m: quantized_roles(m, PrecisionConfig(roles=None)), workers=1)
    for file in path.iterdir():
        if file.suffix in (".py", ".model") or file.name.startswith("tokenizer"):
            assert (tmp_path / "int4" / file.name).read_bytes() == file.read_bytes()
    written = model_of(open_source(tmp_path / "int4"))
    assert not audit_checkpoint(
        PrecisionPlan.with_format(written, grid, quantized_roles(written, PrecisionConfig(roles=None))), tmp_path / "int4"
    )
    started = ModelConfig(**(vars(model) | {"hf_checkpoint": str(tmp_path / "int4")}))
    build_model(started, dtype=torch.bfloat16, seed=0)
    assert load_tokenizer(started)("the ring").input_ids == load_tokenizer(model)("the ring").input_ids
    assert nothing_ran(path) and nothing_ran(tmp_path / "int4")


def test_what_is_saved_beside_weights_loads_again_without_code(folder: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    path, model = folder
    (path / "generation_config.json").write_text('{"eos_token_id": 280}')
    save_config(model, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"tiktoken.model", "tokenizer_config.json", "generation_config.json", "config.json"} < names
    assert {name for name in names if name.endswith(".py")} == {
        "tokenization_moonshot.py" if path.name == "moonlight" else "tokenization_kimi.py"
    }
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    again = ModelConfig(**(vars(model) | {"hf_checkpoint": str(tmp_path / "saved")}))
    assert len(load_tokenizer(again)) == VOCAB and checkpoint_config(again).to_dict() == checkpoint_config(model).to_dict()
    write_model_folder(model, PrecisionPlan.from_quantization_config(model, None), tmp_path / "engine")
    engine = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert engine["model_type"] == "deepseek_v3" and engine["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "auto_map" not in engine and nothing_ran(path) and nothing_ran(tmp_path / "saved")


@pytest.mark.parametrize("family", ["qwen3", "mimo"])
def test_code_beside_other_families_does_not_run_either(tmp_path: Path, family: str) -> None:
    """MiMo's folders bring theirs; a tokenizer.json is complete without the class that the folder names."""
    fields: dict[str, Any] = {"num_mtp_layers": 1, "attention_bias": True, "qk_norm": False} if family == "mimo" else {}
    config = ModelConfig(**(BASE_MODEL | {"name": "tiny", "family": family} | fields))
    write_source(tmp_path / "source", config, shards=1)
    with_planted_code(tmp_path / "source")
    started = ModelConfig(**(vars(config) | {"hf_checkpoint": str(tmp_path / "source")}))
    built = build_model(started, dtype=torch.float32, seed=0)
    assert type(built).__module__.startswith(("transformers.", "runner."))
    assert load_tokenizer(started)("12").input_ids == byte_tokenizer()("12").input_ids
    if family == "mimo":
        layers, _ = build_layers(started, "sdpa", torch.float32)
        assert len(layers) == 1
    draft = draft_model(config, str(tmp_path / "source"))
    build_model(draft, dtype=torch.float32, seed=0)
    save_config(started, tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert nothing_ran(tmp_path / "source")


def test_a_file_of_the_tokenizer_that_is_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    config = model("qwen3")
    write_source(tmp_path / "source", config, shards=1)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "source" / "generation_config.json").symlink_to(tmp_path / "secret")
    started = ModelConfig(**(vars(config) | {"hf_checkpoint": str(tmp_path / "source")}))
    with pytest.raises(UserError, match="leads out of its folder"):
        save_config(started, tmp_path / "saved")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "source" / "generation_config.json").unlink()
    (tmp_path / "source" / "tokenizer.json").rename(blobs / "abc")
    (tmp_path / "source" / "tokenizer.json").symlink_to(blobs / "abc")  # as the hub's own downloads lie
    save_config(started, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


SHORT = [
    "steps=1", "warm_start.max_steps=1", "warm_start.check_interval_steps=1", "algorithm.prompts_per_step=2",
    "algorithm.samples_per_prompt=2", "evaluation.interval_steps=0", "tracking=none", "checkpoint.interval_steps=1",
    "rollout.sampling.max_response_tokens=8", "speculative=none", "trainer.threads=1", "precision.group_size=32",
]  # fmt: skip


def runner(*words: str, expect: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "runner", *words], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.night  # forty seconds each
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_it_and_is_exported(tmp_path: Path, kind: str) -> None:
    """Plan, run, resume, export and audit, as a user types them."""
    model = published(tmp_path / kind, kind)
    words = [*overrides(model), *SHORT, f"outputs_dir={tmp_path / 'outputs'}"]
    assert "FITS" in runner("plan", *words)
    runner(*words, "run_name=first")
    runner(f"resume={tmp_path / 'outputs' / 'first'}", "steps=2", f"outputs_dir={tmp_path / 'outputs'}")
    runner("export", f"run={tmp_path / 'outputs' / 'first'}", f"target={tmp_path / 'out'}", "format=int4")
    assert "no differences" in runner("audit", str(tmp_path / "out"), "precision=int4_qat", "precision.group_size=32")
    for name in ("tiktoken.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / kind / name).read_bytes()
    assert nothing_ran(tmp_path / kind) and nothing_ran(tmp_path / "out")
