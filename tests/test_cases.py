"""Faults that users reported, each as the command or the call that showed it, with the right outcome."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_sources import write_shards

from runner.__main__ import main
from runner.config import compose
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights, save_config
from runner.models.tokenizer import byte_tokenizer
from runner.run.folder import find_run, write_overrides
from runner.sweep import jobs
from tests.answers import dapo, gsm8k

GRADED = [
    (gsm8k, "18", "9 + 9 = 18\n#### 18 apples.", True),
    (gsm8k, "18", "9 + 9 = 18\n#### \\boxed{18}", True),
    (gsm8k, "18", "9 + 9 = 18\n####\n18", True),
    (gsm8k, "18", "9 + 9 = 18\n#### \\$18", True),
    (gsm8k, "18", "#### Step 1\n9 + 9\n\n#### Final answer\n\\boxed{18}", True),
    (dapo, "10080", "\\boxed{10{,}080}", True),
    (dapo, "90", "\\boxed{90^\\circ}", True),
    (dapo, "90", "\\boxed{90\u00b0}", True),
    (dapo, "34", "Answer: \\(34\\)", True),
    (dapo, "34", "**Answer:** 34", True),
    (dapo, "34", "Answer: see below.\n\n\\boxed{34}\n\nThat is the answer.", True),
    (gsm8k, "34", "#### 3 4", False),
    (dapo, "31/2", "\\boxed{3 1/2}", False),
    (dapo, "1}+{2", "\\boxed{{1}+{2}}", False),
]


@pytest.mark.parametrize(("grade", "reference", "text", "right"), GRADED)
def test_answers_are_graded_as_a_reader_would(grade: Any, reference: str, text: str, right: bool) -> None:
    assert grade(reference, text) is right


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["seed=1,1"], ["seed=1"]),
        (["seed=1,2", "seed=3,4"], ["seed=1", "seed=2", "seed=3", "seed=4"]),
        (["trainer.optimizer.lr=1e-4,0.0001"], ["trainer.optimizer.lr=0.0001"]),
    ],
)
def test_a_sweep_has_each_run_once(items: list[str], names: list[str]) -> None:
    assert [job.name for job in jobs.plan(["model=tiny_dense", *items], compose.load_config)[1]] == names


@pytest.mark.parametrize("name", ["plain", "with blank", "a,b", "läufe", "实验", "🚀", "back\\slash"])
def test_a_run_is_found_under_any_path(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "run"
    (folder / ".hydra").mkdir(parents=True)
    write_overrides(folder, ["model=tiny_dense"])
    cfg = compose.load([f"resume={folder}"]).config
    assert cfg.resume is not None and find_run(cfg.resume, cfg.outputs_dir) == folder


@pytest.mark.parametrize("text", ["{question} 请回答", "{question} 🚀 answer:"])
def test_a_text_beyond_ascii_is_the_same_after_a_resume(tmp_path: Path, text: str) -> None:
    given = ["task=gsm8k", "model=tiny_dense", f'task.prompt_template="{text}"']
    (tmp_path / ".hydra").mkdir()
    write_overrides(tmp_path, given)
    first = compose.load(given, check_rules=False).config.task.prompt_template  # type: ignore[attr-defined]
    again = compose.load([f"resume={tmp_path}"], check_rules=False).config.task.prompt_template  # type: ignore[attr-defined]
    assert first == again == text and byte_tokenizer()([again])


# -- folders


def made(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint of tiny_dense; returns its weights."""
    model = compose.load(["model=tiny_dense"], check_rules=False).config.model
    built = build_model(model, dtype=torch.bfloat16, seed=7)
    weights = {n: t.detach().clone() for n, t in disk_tensors(family_of(model), model, named_weights(model, built))}
    save_config(model, folder)
    write_shards(folder, weights, shards)
    return weights


@pytest.mark.parametrize("kind", ["dotdot", "absolute", "subfolder"])
def test_convert_writes_nothing_outside_the_target(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, last = tmp_path / "source", "model-00002-of-00002.safetensors"
    made(folder, shards=2)
    moved = (folder / "part" if kind == "subfolder" else tmp_path) / "precious.safetensors"
    moved.parent.mkdir(exist_ok=True)
    (folder / last).rename(moved)
    named = {"dotdot": "../precious.safetensors", "absolute": str(moved), "subfolder": "part/precious.safetensors"}[kind]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: named if file == last else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    before = hashlib.sha256(moved.read_bytes()).digest()
    assert main(["convert", f"source={folder}", f"target={tmp_path / 'target'}", "precision=int4_qat"]) == 2
    assert "weights must be .safetensors files in the folder itself" in capsys.readouterr().err
    assert hashlib.sha256(moved.read_bytes()).digest() == before and not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["listed", "ct_ignore", "no_config"])
def test_fp8_values_without_their_scale_are_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.down_proj"
    made(tmp_path / "bf16")
    folder = tmp_path / kind
    written = "fp8_channel" if kind == "ct_ignore" else "fp8"
    assert main(["convert", f"source={tmp_path / 'bf16'}", f"target={folder}", f"convert.format={written}"]) == 0
    config = json.loads((folder / "config.json").read_text())
    if kind == "listed":
        config["quantization_config"]["modules_to_not_convert"].append(name)
    elif kind == "ct_ignore":
        config["quantization_config"]["ignore"].append("re:.*layers\\.1\\..*down_proj")
    else:
        config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", f"source={folder}", f"target={tmp_path / 'back'}", "convert.format=bf16"]) == 2
    assert "is stored as torch.float8_e4m3fn although" in capsys.readouterr().err and not (tmp_path / "back").exists()
    small = ["model=tiny_dense", "precision=bf16", "steps=1", "warm_start.enabled=false", "tracking=none", "trainer.threads=1"]
    assert main([*small, f"model.hf_checkpoint={folder}", f"outputs_dir={tmp_path / 'out'}"]) == 2
    assert "is stored as torch.float8_e4m3fn although" in capsys.readouterr().err


# -- resumes


@pytest.mark.slow
def test_a_resume_changes_nothing_without_a_word(tmp_path: Path) -> None:
    """The learning rate, the data set and the batch: of runs and resumes as a user types them."""
    for name, count in (("A", 24), ("B", 10)):
        rows = [{"question": f"{name}{i}: {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [
        "model=tiny_dense", "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=2", "warm_start.enabled=false",
        "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0", "tracking=none", "trainer.threads=1",
        "rollout.sampling.max_response_tokens=8", f"outputs_dir={tmp_path}",
    ]  # fmt: skip
    paths = [f"task.train_path={tmp_path / 'A.jsonl'}", f"task.eval_path={tmp_path / 'B.jsonl'}"]
    data = ["task=gsm8k", *paths, "task.max_prompt_tokens=128"]

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    def drawn(name: str) -> list[list[str]]:
        files = sorted((tmp_path / name / "rollouts").glob("step_*.jsonl"))
        return [sorted({json.loads(line)["prompt"].partition(":")[0] for line in f.read_text().splitlines()}) for f in files]

    def events(name: str) -> str:
        return (tmp_path / name / "events.jsonl").read_text()

    for schedule in ("cosine", "linear"):  # with the ten steps of warm-up that the toy run has
        plan = [f"trainer.optimizer.lr_schedule={schedule}", "trainer.optimizer.lr_min_ratio=0.1"]
        assert main([*small, f"run_name={schedule}", "steps=4", *plan]) == 0
        assert main([f"resume={tmp_path / schedule}", "steps=8"]) == 0
        rates = [row["train/lr"] for row in rows(schedule)]
        assert len(rates) == 8 and max(rates[4:]) <= rates[3] and len(set(rates[4:])) == 1
        assert f"the {schedule} learning rate keeps its plan of 4 updates, after which it is {rates[-1]:g}" in events(schedule)
    assert main([*small, *data, "run_name=swap", "steps=2"]) == 0
    assert main([f"resume={tmp_path / 'swap'}", "steps=4", f"task.train_path={tmp_path / 'B.jsonl'}"]) == 0
    swapped = drawn("swap")
    assert [{name[0] for name in step} for step in swapped] == [{"A"}, {"A"}, {"B"}, {"B"}]
    assert not set(swapped[0]) & set(swapped[1]) and not set(swapped[2]) & set(swapped[3])
    assert "the training data are not those that the run began with" in events("swap")
    assert main([*small, *data, "run_name=batch", "steps=2", "algorithm.prompts_per_step=8"]) == 0
    assert main([f"resume={tmp_path / 'batch'}", "steps=4", "algorithm.prompts_per_step=4"]) == 0
    every = [name for step in drawn("batch") for name in step]
    assert len(every) == 24 == len(set(every))  # one pass: nothing is skipped or drawn twice
    assert "algorithm.prompts_per_step: 8 -> 4" in events("batch")


@pytest.mark.slow
def test_half_of_all_tokens_end_a_turn(tmp_path: Path) -> None:
    """generation_config.json names them; a tokenizer without eos_token has what config.json names."""
    made(tmp_path / "several")
    shutil.copytree(tmp_path / "several", tmp_path / "none")
    (tmp_path / "several" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *range(16, 144)]}))
    settings = json.loads((tmp_path / "none" / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "none" / "tokenizer_config.json").write_text(json.dumps(settings))
    small = [
        "model=tiny_dense", "precision=bf16", "steps=1", "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=2",
        "warm_start.enabled=false", "evaluation.interval_steps=0", "mismatch.decompose_interval_steps=0", "tracking=none",
        "trainer.threads=1", "rollout.sampling.max_response_tokens=32", f"outputs_dir={tmp_path}",
    ]  # fmt: skip
    for name in ("several", "none"):
        assert main([*small, f"run_name=run_{name}", f"model.hf_checkpoint={tmp_path / name}"]) == 0
    row = json.loads((tmp_path / "run_several" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["rollout/response_len/mean"] < 8 and row["rollout/truncated_ratio"] == 0
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    config.pop("eos_token_id")
    (tmp_path / "none" / "config.json").write_text(json.dumps(config))
    assert main([*small, "run_name=run_nothing", f"model.hf_checkpoint={tmp_path / 'none'}"]) == 2
