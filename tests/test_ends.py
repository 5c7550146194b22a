"""Where a sample ends: the union of what tokenizer, generation_config.json and config.json name, in every engine and folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.__main__ import main
from runner.config import compose
from runner.config.schema import ModelConfig
from runner.data import Request, SamplingParams
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights, save_config
from runner.models.ends import end_tokens, unlisted_turn_end
from runner.models.tokenizer import byte_tokenizer, load_tokenizer
from runner.models.vocabulary import EOS_ID, FIRST_BYTE_ID
from runner.precision.plan import PrecisionPlan
from runner.rollout.sglang.model_folder import write_model_folder
from runner.weights.files import write_tensors

HALF = list(range(FIRST_BYTE_ID, FIRST_BYTE_ID + 128))  # about half of what a random model says
SMALL = [
    "model=tiny_dense", "precision=bf16", "steps=1", "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=2",
    "warm_start.enabled=false", "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0", "tracking=none",
    "trainer.threads=1", "rollout.sampling.max_response_tokens=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder with weights, tokenizer and config."""
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    folder.mkdir()
    model = compose.load(["model=tiny_dense"]).config.model
    built = build_model(model, dtype=torch.bfloat16, seed=7)
    tensors = {n: t.detach().clone() for n, t in disk_tensors(family_of(model), model, named_weights(model, built))}
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    save_config(model, folder)
    return folder


def checkpoint(
    published: Path,
    folder: Path,
    *,
    tokenizer_eos: bool = True,
    generation: Any = None,
    config: dict[str, Any] | None = None,
) -> ModelConfig:
    """The model of a copy whose files name these ends; `generation` may be any text."""
    folder.mkdir(exist_ok=True)
    for path in published.iterdir():
        if path.name.endswith(".safetensors"):
            (folder / path.name).symlink_to(path)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    if not tokenizer_eos:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("eos_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps({"eos_token_id": generation})
        (folder / "generation_config.json").write_text(text)
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(fields | (config or {})))
    return compose.load(["model=tiny_dense", f"model.hf_checkpoint={folder}"], check_rules=False).config.model


@pytest.mark.parametrize(
    ("files", "extra", "wanted"),
    [
        ({}, [], [EOS_ID]),
        ({"generation": 17}, [], [EOS_ID, 17]),  # Moonlight and Kimi-K2: a turn ends with another id than the tokenizer's eos
        ({"generation": [17, 18]}, [], [EOS_ID, 17, 18]),
        ({"generation": None, "config": {"eos_token_id": [19, 1]}}, [], [EOS_ID, 19]),
        ({"config": {"text_config": {"eos_token_id": 20}}}, [], [EOS_ID, 20]),
        ({"tokenizer_eos": False, "generation": 17, "config": {"eos_token_id": 18}}, [], [17, 18]),
        ({"tokenizer_eos": False}, [21], [21]),
        ({"generation": [17, 17, EOS_ID]}, [21, 17], [EOS_ID, 17, 21]),
        ({"generation": '{"temperature": 0.6}'}, [], [EOS_ID]),
        ({"generation": '{"eos_token_id": null}'}, [], [EOS_ID]),
        ({"generation": [5000, -1]}, [], [EOS_ID]),  # ids without an embedding cannot be sampled
    ],
)
def test_the_union_of_all_files_ends_a_sample(
    published: Path, tmp_path: Path, files: dict[str, Any], extra: list[int], wanted: list[int]
) -> None:
    model = checkpoint(published, tmp_path / "copy", **files)
    tokenizer = load_tokenizer(model)
    ends = end_tokens(model, tokenizer, extra)
    assert ends.ids == tuple(wanted)
    assert ends.last == (EOS_ID if files.get("tokenizer_eos", True) else wanted[0])
    assert set(ends.unused) == {index for index in (5000, -1) if files.get("generation") == [5000, -1]}
    summary = ends.summary(tokenizer)
    assert all(str(index) in summary for index in wanted)
    assert ("generation_config.json" in summary) == any(name == "generation_config.json" for name, _ in ends.sources)


@pytest.mark.parametrize(
    ("files", "extra", "message", "key"),
    [
        ({"tokenizer_eos": False}, [], "does not name an end token", "rollout.sampling.stop_token_ids"),
        ({"tokenizer_eos": False, "generation": []}, [], "does not name an end token", "rollout.sampling.stop_token_ids"),
        ({"tokenizer_eos": False, "generation": 5000}, [], "an end token with an embedding", "rollout.sampling.stop_token_ids"),
        ({}, [272], "272: the model has the ids 0 to 271", "rollout.sampling.stop_token_ids"),
        ({}, [-1], "-1: the model has", "rollout.sampling.stop_token_ids"),
        ({"generation": "</s>"}, [], "is not JSON", "model.hf_checkpoint"),
        ({"generation": "[1]"}, [], "does not hold a JSON object", "model.hf_checkpoint"),
        ({"generation": '{"eos_token_id": "</s>"}'}, [], "'</s>' is no token id", "model.hf_checkpoint"),
        ({"generation": [[1]]}, [], "is no token id", "model.hf_checkpoint"),
        ({"generation": True}, [], "is no token id", "model.hf_checkpoint"),
        ({"config": {"eos_token_id": 1.5}}, [], "is no token id", "model.hf_checkpoint"),
    ],
)
def test_no_end_or_a_wrong_one_is_refused(
    published: Path, tmp_path: Path, files: dict[str, Any], extra: list[int], message: str, key: str
) -> None:
    model = checkpoint(published, tmp_path / "copy", **files)
    with pytest.raises(UserError, match="(?s)" + message.replace("[", r"\[")) as caught:
        tokenizer = byte_tokenizer()
        if not files.get("tokenizer_eos", True):
            tokenizer.eos_token = None
        end_tokens(model, tokenizer, extra)
    assert caught.value.key == key and caught.value.fix


@pytest.mark.slow
def test_a_run_ends_its_samples_there_says_so_and_keeps_the_file(published: Path, tmp_path: Path) -> None:
    """Also the case of ../shared/cases/end_of_turn.py: half of all byte tokens end a turn."""
    checkpoint(published, tmp_path / "copy", generation=HALF)
    run = [*SMALL, f"outputs_dir={tmp_path}", f"model.hf_checkpoint={tmp_path / 'copy'}", "rollout.sampling.stop_token_ids=[2]"]
    assert main([*run, "run_name=several"]) == 0
    folder = tmp_path / "several"
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert row["rollout/truncated_ratio"] == 0 and 1 <= row["rollout/response_len/mean"] < 8
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = next(event for event in events if event["kind"] == "end_tokens")
    assert told["data"]["ids"] == [EOS_ID, 2, *HALF]
    assert set(told["data"]["sources"]) == {"tokenizer", "generation_config.json", "rollout.sampling.stop_token_ids"}
    kept = folder / "checkpoints" / "step_000001" / "trainer" / "generation_config.json"
    assert json.loads(kept.read_text()) == {"eos_token_id": HALF}
    assert main(["export", f"run={folder}", f"target={tmp_path / 'exported'}", "format=bf16"]) == 0
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text()) == {"eos_token_id": HALF}
    assert main(["convert", f"source={tmp_path / 'copy'}", f"target={tmp_path / 'int4'}", "precision=int4_qat"]) == 0
    assert json.loads((tmp_path / "int4" / "generation_config.json").read_text()) == {"eos_token_id": HALF}


def test_a_checkpoint_without_an_end_does_not_start(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(published, tmp_path / "copy", tokenizer_eos=False)
    run = [*SMALL, f"outputs_dir={tmp_path}", "run_name=none", f"model.hf_checkpoint={tmp_path / 'copy'}"]
    assert main(run) == 2
    assert "rollout.sampling.stop_token_ids" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_server_gets_the_union_with_every_request_and_no_ends_of_its_own(published: Path, tmp_path: Path) -> None:
    model = checkpoint(published, tmp_path / "copy", generation=[17, 18], config={"eos_token_id": 19})
    cfg = compose.load(["model=tiny_dense", "precision=bf16"]).config
    ends = end_tokens(model, load_tokenizer(model), [])
    write_model_folder(model, PrecisionPlan.build(model, cfg.precision, "rollout"), tmp_path / "server")
    assert json.loads((tmp_path / "server" / "config.json").read_text())["eos_token_id"] is None
    assert not (tmp_path / "server" / "generation_config.json").exists()
    pytest.importorskip("aiohttp", reason="make setup-sglang installs it")
    from runner.rollout.sglang.decoding import Generation

    request = Request("p", 0, (20, 21), SamplingParams(1.0, 8, stop_token_ids=ends.ids), seed=1)
    params = Generation(request, 64, None, "key").payload(0)["sampling_params"]
    assert params["stop_token_ids"] == [EOS_ID, 17, 18, 19] and params["ignore_eos"] is False


def test_the_token_that_ended_a_sample_is_no_part_of_its_answer(published: Path, tmp_path: Path) -> None:
    model = checkpoint(published, tmp_path / "copy", generation=[17])
    ends = end_tokens(model, load_tokenizer(model), [])
    assert ends.without_last([30, 17]) == [30] and ends.without_last([30, 31]) == [30, 31] and ends.without_last([]) == []


def test_a_chat_template_that_closes_turns_with_another_token_is_pointed_out() -> None:
    model = compose.load(["model=tiny_dense"]).config.model
    tokenizer = byte_tokenizer()
    ends = end_tokens(model, tokenizer, [])
    assert unlisted_turn_end(tokenizer, ends) is None
    tokenizer.chat_template = "{% for m in messages %}<reserved_6>{{ m['content'] }}<reserved_7>\n{% endfor %}"
    assert unlisted_turn_end(tokenizer, ends) == "<reserved_7>"
    assert unlisted_turn_end(tokenizer, end_tokens(model, tokenizer, [7])) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert unlisted_turn_end(tokenizer, ends) is None
