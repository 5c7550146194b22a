"""task=visual_zoom: scenes, the fields that are shown, rewards, and that the gradient goes where the answer comes from."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_local_engine import FP32
from test_turns_images import SMALL, conversing, talk
from test_vision import IMAGE

from runner.config import compose
from runner.config.schema import Config
from runner.data import Batch
from runner.errors import UserError
from runner.models.build import load_tokenizer
from runner.models.images import Images, image_processor
from runner.rollout.local import LocalPool
from runner.run.sync import _probe_batch
from runner.tasks.protocol import Prompt
from runner.tasks.visual_zoom import GROUNDS, INKS, VisualZoomTask, Zoom, draw, reduced
from runner.trainer.torch.trainer import TorchTrainer
from tests.configs import problems


@lru_cache
def config(*overrides: str) -> Config:
    return compose.load_config([*SMALL, "task=visual_zoom", *overrides])


def task(*overrides: str) -> VisualZoomTask:
    cfg = config(*overrides)
    tokenizer = load_tokenizer(cfg.model)
    return VisualZoomTask(cfg.task, tokenizer, image_processor(cfg.model, tokenizer))  # type: ignore[arg-type]


def steps(prompt: Prompt, *said: str) -> list[tuple[Any, bool, dict[str, Any]]]:
    zoom = Zoom(0.25, 0.1)

    async def all_of_them() -> list[tuple[Any, bool, dict[str, Any]]]:
        await zoom.reset(prompt)
        return [await zoom.step(text) for text in said]

    return asyncio.run(all_of_them())


def test_scenes_depend_on_seed_split_and_index_alone() -> None:
    one, other = task(), task("task.seed=9")
    again, _ = task(), one.eval_prompts(3)
    for a, b, c in zip(one.train_prompts(3, 4), again.train_prompts(3, 4), other.train_prompts(3, 4), strict=True):
        assert (a.text, a.tokens, a.answer) == (b.text, b.tokens, b.answer)
        assert np.array_equal(a.originals[0], b.originals[0]) and not np.array_equal(a.originals[0], c.originals[0])
    held = [prompt.originals[0].tobytes() for prompt in one.eval_prompts(256)]
    assert held == [prompt.originals[0].tobytes() for prompt in other.eval_prompts(256)] and len(set(held)) == 256
    answers = [int(prompt.answer) for step in range(10) for prompt in one.train_prompts(step, 40)]
    assert set(answers) == set(range(5)) and max(answers.count(value) for value in range(5)) < 120


def test_the_field_that_is_asked_about_holds_what_is_counted_and_is_shown_whole() -> None:
    made = task("task.noise=0", "task.clutter=1.0")
    for scene in made._held_out[:40]:
        prompt = made._prompt("p", scene)
        ((shown, done, info),) = steps(prompt, f"zoom {scene.wanted + 1}")
        field = scene.fields[scene.wanted]
        assert shown.shape == (24, 24, 3) and not done and info["rewards"] == {"field": 0.25}
        ground = np.array(GROUNDS[field.ground])
        kinds = {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()}
        assert kinds <= {tuple(ground.tolist()), *((level,) * 3 for level in INKS.values())}
        found = 0
        for cell in range(9):
            part = shown[cell // 3 * 8 :, cell % 3 * 8 :][:8, :8]
            found += bool((part == INKS[scene.kind[0]]).all(-1).any())
        assert found == scene.count == int(prompt.answer)


def test_in_the_reduced_image_grounds_show_and_shapes_do_not() -> None:
    made = task()
    for scene in made._held_out[:40]:
        small = reduced(draw(scene, made.cfg), 4, 16)
        assert small.shape == (16, 16, 3)
        for number, field in enumerate(scene.fields):
            tile = small[number // 2 * 8 :, number % 2 * 8 :][:8, :8].reshape(-1, 3).astype(int)
            assert len({tuple(pixel) for pixel in tile.tolist()}) <= 4  # of 576 that the field has
            hue = tile.mean(0) - tile.mean()  # ink is gray: it moves all three alike
            grounds = {other.ground: np.array(GROUNDS[other.ground]) for other in scene.fields}
            hues = {name: color - color.mean() for name, color in grounds.items()}
            assert max(hues, key=lambda name: hue @ hues[name] / np.linalg.norm(hues[name])) == field.ground
    prompt = made._prompt("p", made._held_out[0])
    assert prompt.tokens.count(IMAGE) == 4 and len(prompt.originals[0]) == 48


def test_turns_are_rewarded_as_they_deserve() -> None:
    prompt = task().train_prompts(0, 1)[0]
    right, wrong = prompt.info["field"], prompt.info["field"] % 4 + 1
    found = steps(prompt, f"zoom {wrong}", f"zoom {right}", f"zoom {right}", "zoom 5", "what?", f"0+0={int(prompt.answer) + 1}")
    assert [info.get("rewards") for _, _, info in found] == [
        {}, {"field": 0.25}, {}, {"format": -0.1}, {"format": -0.1}, {"answer": 0.0}
    ]  # fmt: skip
    assert [done for _, done, _ in found] == [False] * 5 + [True]
    assert steps(prompt, f"1+1={prompt.answer}")[0][2]["rewards"] == {"answer": 1.0}


def test_worked_solutions_are_the_turns_of_a_conversation() -> None:
    made = task()
    for (asked, call), (looked, answer) in zip(*[iter(made.worked_solutions(20, seed=1))] * 2, strict=True):
        assert isinstance(asked, Prompt) and isinstance(looked, Prompt)
        (shown, _, info), (_, done, last) = steps(asked, call, answer)
        assert info["rewards"] == {"field": 0.25} and done and last["rewards"] == {"answer": 1.0}
        assert looked.images[0] is asked.images[0] and np.array_equal(looked.images[1].pixels, shown)
        assert looked.tokens[: len(asked.tokens)] == asked.tokens
        for image in looked.images:
            assert looked.tokens[image.start : image.start + image.tokens] == (IMAGE,) * image.tokens


@pytest.fixture(scope="module")
def taught() -> tuple[Config, TorchTrainer, LocalPool, VisualZoomTask]:
    """A trainer that knows the form of a conversation, from a few worked solutions."""
    cfg = config(*FP32)
    made = task(*FP32)
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    pairs = made.worked_solutions(64, seed=3)
    ids = made._ids
    picks = [(torch.tensor([*p.tokens, *ids(text), 1]), len(p.tokens)) for p, text in pairs]  # type: ignore[union-attr]
    images = [p.images for p, _ in pairs]  # type: ignore[union-attr]
    losses = [trainer.sft_step(picks, 4e-3, images)["sft/loss"] for _ in range(60)]
    assert losses[-1] < 0.35 < losses[0]
    for master in trainer.optimizer.masters.values():
        master.copy_(master.to(torch.bfloat16))  # what is exported
    trainer._write_weights()
    assert pool.update_weights(trainer.version, trainer.export()).problems == []
    return cfg, trainer, pool, made


def test_a_taught_model_zooms_and_its_conversations_are_aligned(
    taught: tuple[Config, TorchTrainer, LocalPool, VisualZoomTask],
) -> None:
    cfg, trainer, pool, made = taught
    section = conversing(cfg, environment="runner.tasks.visual_zoom.Zoom", arguments={"zoom_reward": 0.25, "format_penalty": 0.1})
    section = conversing(section, max_turns=4, max_turn_tokens=16)
    prompts = made.train_prompts(0, 16)
    samples = talk(section, pool, prompts, samples=2, budget=64)
    two = [sample for sample in samples if len(sample.images) == 2]
    assert len(two) >= 8  # the call is learnt
    assert all(sample.images[0] is prompts[i // 2].images[0] for i, sample in enumerate(samples))
    batch = Batch(samples, [torch.ones(sample.response_length) for sample in samples], temperature=1.0)
    for ours, sample in zip(trainer.logprobs(batch), samples, strict=True):
        mask = sample.loss_mask
        torch.testing.assert_close(ours[mask], sample.rollout_logprobs[mask], atol=1e-3, rtol=0)
        for image in sample.images[1:]:
            at = image.start - sample.prompt_length
            assert not mask[at - 1 : at + image.tokens + 1].any()


def test_the_answer_is_read_from_the_crop_and_a_few_steps_overfit_it(
    taught: tuple[Config, TorchTrainer, LocalPool, VisualZoomTask],
) -> None:
    """Supervised on both turns of 8 problems, the loss goes to nothing, and the conversations about them, with the fields
    that the model asks for, are rewarded; with the crops of other problems the answers are others: they come from the images."""
    cfg, _, pool, made = taught
    trainer = TorchTrainer(cfg)
    pairs = made.worked_solutions(16, seed=5)
    prompts = [prompt for prompt, _ in pairs[::2]]
    picks = [(torch.tensor([*p.tokens, *made._ids(text), 1]), len(p.tokens)) for p, text in pairs]  # type: ignore[union-attr]
    images = [p.images for p, _ in pairs]  # type: ignore[union-attr]
    for _ in range(150):
        loss = trainer.sft_step(picks, 3e-3, images)["sft/loss"]
    assert loss < 0.05
    for master in trainer.optimizer.masters.values():
        master.copy_(master.to(torch.bfloat16))  # what is exported
    trainer._write_weights()
    assert pool.update_weights(trainer.version + 1, trainer.export()).problems == []
    section = conversing(cfg, environment="runner.tasks.visual_zoom.Zoom", arguments={"zoom_reward": 0.0, "format_penalty": 0.1})
    samples = talk(conversing(section, max_turns=4, max_turn_tokens=16), pool, prompts, samples=4, budget=64)  # type: ignore[arg-type]
    assert sum(sum(sample.rewards.values()) for sample in samples) / len(samples) > 0.9
    assert all(len(sample.images) >= 2 for sample in samples)

    answers, shown = picks[1::2], images[1::2]
    swapped = [
        (overview, dataclasses.replace(crop, pixels=other.pixels))
        for (overview, crop), (_, other) in zip(shown, shown[1:] + shown[:1], strict=True)
    ]

    def negative_logprob(shown: list[Images]) -> float:
        batch = _probe_batch([tokens for tokens, _ in answers], shown)
        rows = trainer.logprobs(batch, routes="own")
        return float(-torch.cat([row[prompt - 1 :] for row, (_, prompt) in zip(rows, answers, strict=True)]).mean())

    assert negative_logprob(shown) < 0.1 and negative_logprob(swapped) > 5 * negative_logprob(shown)


# ---- rules


@pytest.mark.parametrize(
    ("overrides", "key", "said", "fix"),
    [
        ("task.rollout._target_=null task.rollout.environment=null", "task.rollout._target_", "too small", "runner.turns.drive"),
        ("task.inks=1 task.shapes=1", "task.inks", "nothing else", "task.inks=2"),
        ("task.max_count=10", "task.max_count", "10 shapes in 3 x 3", "task.max_count=3"),
        ("task.grid=16 task.cell_pixels=32", "task.rollout.max_observation_tokens", "4098 tokens", "=4098"),
        ("evaluation.num_prompts=300", "evaluation.num_prompts", "256 are held out", "eval_problems=300"),
        ("task.rollout.min_image_pixels=300000", "task.rollout.min_image_pixels", "300000 to 262144", "=262144"),
    ],
)
def test_rules(overrides: str, key: str, said: str, fix: str) -> None:
    found = problems("model=tiny_vlm", "task=visual_zoom", *overrides.split())
    about = [error for error in found if error.key == key and said in error.problem]
    assert about and fix in (about[0].fix or ""), "\n".join(map(str, found))


def test_fields_that_cut_image_tokens_are_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError, match="an image token is 8") as caught:
        task("task.grid=3", "task.cell_pixels=9")
    assert caught.value.fix == "task.cell_pixels=16"


# ---- whole runs

SHORT = [
    "model=tiny_vlm", "task=visual_zoom", "steps=4", "warm_start.max_steps=60", "warm_start.check_interval_steps=60",
    "warm_start.cache=false", "checkpoint.interval_steps=2", "algorithm.prompts_per_step=4", "algorithm.samples_per_prompt=4",
    "evaluation.interval_steps=4", "evaluation.num_prompts=8", "tracking=none", "speculative.auto_disable=false",
    "trainer.threads=1", "algorithm.schedule=one_step_off", "task.rollout.lockstep_seconds=60", "algorithm.turn_credit=returns",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_resumed_run_repeats_the_uninterrupted_one_and_its_images_are_shown(tmp_path: Path) -> None:
    """One step off policy: the checkpoint after step 2 holds the conversations of step 3, images included."""

    def run(*arguments: str) -> str:
        line = [sys.executable, "-m", "runner", *arguments]
        result = subprocess.run(line, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    run(*SHORT, f"outputs_dir={tmp_path}", "run_name=whole")
    line = [sys.executable, "-m", "runner", *SHORT, f"outputs_dir={tmp_path}", "run_name=killed"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 900
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    run(f"resume={tmp_path / 'killed'}")
    whole, again = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    for one, other in zip(whole, again, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith("perf/")} == {
            k: v for k, v in other.items() if not k.startswith("perf/")
        }
    assert all(row["rollout/failed"] == 0 and row["rollout/turns/mean"] > 1 and row["rollout/tool_calls"] > 0 for row in whole)
    page = tmp_path / "page.html"
    run("show", str(tmp_path / "whole"), "4", "--out", str(page))
    assert page.read_text().count("data:image/png") >= 8 and "data:image/png" in (tmp_path / "whole" / "report.html").read_text()
