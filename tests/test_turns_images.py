"""Images in conversations: observations that show some, everything aligned with them, caches, and what cannot be shown."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_local_engine import FP32
from test_vision import IMAGE, noise_image, processor, reference_inputs

from runner.config import compose
from runner.config.choices import ObservationRole
from runner.config.schema import Config
from runner.data import Batch, Request, Sample, SamplingParams, Status, WeightSpan
from runner.models.build import load_tokenizer
from runner.rollout.local import LocalPool
from runner.run.collect import Collector
from runner.tasks.geo3k import Geo3kTask
from runner.tasks.protocol import Prompt
from runner.trainer.torch.trainer import TorchTrainer
from runner.turns.codec import Codec
from runner.turns.context import Context, Engine
from runner.turns.conversations import Asked, Conversations, metrics
from runner.turns.failure import Failed
from runner.turns.pictures import Pictures
from runner.turns.returned import checked
from runner.turns.transcript import Transcript

HERE, END, VOCABULARY = __name__, 1, 272
SIDES = [(16, 24), (8, 8), (24, 16)]  # of the images that are shown, in tokens of 8 pixels
SMALL = ["model=tiny_vlm", "model.num_layers=2", "trainer.threads=1", "warm_start.enabled=false"]


@lru_cache
def config(*overrides: str) -> Config:
    return compose.load_config([*SMALL, *overrides])


class Wrong:
    """Shows what its prompt's text names."""

    async def reset(self, prompt: Prompt) -> Any:
        self.what = prompt.text
        return noise_image(8, 8) if self.what == "at first" else None

    async def step(self, response: str) -> tuple[Any, bool, dict[str, Any]]:
        return WRONG[self.what](), False, {}


def cut_png() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(noise_image(40, 40)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


WRONG: dict[str, Any] = {
    "cut off": cut_png,
    "gray": lambda: np.zeros((8, 8), np.uint8),
    "floats": lambda: np.zeros((8, 8, 3), np.float32),
    "huge": lambda: Image.new("L", (8000, 8000)),
    "long": lambda: noise_image(2, 900),
    "empty": lambda: np.zeros((0, 8, 3), np.uint8),
    "many": lambda: [noise_image(8, 8)] * 5,
    "flood": lambda: [noise_image(400, 400)] * 2,
    "list with bytes": lambda: ["see", b"pixels"],
    "empty list": list,
    "at first": lambda: "see",
    "fine": lambda: Image.fromarray(noise_image(8, 8)).convert("P"),
}
REASONS = {
    "cut off": ("image", "truncated"),
    "gray": ("image", "uint8 \\[8, 8\\], not uint8"),
    "floats": ("image", "float32"),
    "huge": ("image", "8000 x 8000 pixels"),
    "long": ("image", "at most 200 times"),
    "empty": ("image", "8 x 0 pixels"),
    "many": ("image", "6 images in one conversation; task.rollout.max_images=4"),
    "flood": ("flood", "of images\\); 64 are allowed"),
    "list with bytes": ("rubbish", "a list with a bytes"),
    "empty list": ("rubbish", "NoneType"),
}


async def three_turns(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """Whatever the model says, an image after each turn but the last."""
    talk = context.start(prompt)
    for number in range(3):
        await engine.generate(talk, max_tokens=3 + number)
        assert talk.observe([Image.fromarray(noise_image(*SIDES[number], len(prompt.tokens) + number)), "so:"])
    return talk.sample()


def conversing(cfg: Config, **section: Any) -> Config:
    values = {"_target_": "runner.turns.drive", "max_turns": 3, "max_turn_tokens": 5, **section}
    return dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, rollout=dataclasses.replace(cfg.task.rollout, **values)))


def codec(cfg: Config) -> Codec:
    tokenizer = load_tokenizer(cfg.model)
    section = cfg.task.rollout
    pictures = Pictures(processor(cfg), section.max_images, section.min_image_pixels, section.max_image_pixels)
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return Codec(tokenizer, decode, (END,), ObservationRole.none, pictures if cfg.model.vision else None)


def talk(cfg: Config, pool: LocalPool, prompts: list[Prompt], samples: int = 1, budget: int = 120) -> list[Sample]:
    asked = Asked(SamplingParams(1.0, budget, stop_token_ids=(END,)), step=0, capture_routes=False, evaluating=False)
    conversations = Conversations(cfg, None, codec(cfg), concurrency=8, lockstep=True)
    return conversations.run(pool, prompts, samples, asked, lambda: None)


def prompts(cfg: Config) -> list[Prompt]:
    made = processor(cfg)
    one, two = ([noise_image(16, 16, seed)] for seed in (1, 2))
    found = []
    for number, (tokens, shown) in enumerate([((30, IMAGE, 31), one), ((30, IMAGE, 31, IMAGE), one + two), ((30, 31, 32), [])]):
        ids, images = made.place(tokens, shown)
        found.append(Prompt(f"p{number}", "", tuple(ids), "", {}, images))
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Config, TorchTrainer, LocalPool]:
    cfg = config(*FP32, "rollout.prefill_chunk_tokens=40", "trainer.max_tokens_per_gpu=256")
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    for master in trainer.optimizer.masters.values():
        master.copy_(master.to(torch.bfloat16) * 1.5)
        master.copy_(master.to(torch.bfloat16))  # what is exported
    trainer._write_weights()
    assert pool.update_weights(0, trainer.export()).problems == []
    return cfg, trainer, pool


# ---- what is aligned


def test_observations_show_images_and_everything_stays_aligned(pair: tuple[Config, TorchTrainer, LocalPool]) -> None:
    cfg, trainer, pool = pair
    asked = prompts(cfg)
    samples = talk(conversing(cfg, _target_=f"{HERE}.three_turns"), pool, asked, samples=2)
    for place, sample in enumerate(samples):
        prompt = asked[place // 2]
        assert sample.images[: len(prompt.images)] == prompt.images  # the same objects in both samples
        assert len(sample.images) == len(prompt.images) + 2  # nobody saw the one after the last turn
        assert [image.grid for image in sample.images[-2:]] == [(2, 3), (1, 1)]
        own = torch.cat([torch.ones(sample.prompt_length, dtype=torch.bool), sample.loss_mask])
        for image in sample.images:
            where = slice(image.start, image.start + image.tokens)
            assert set(sample.tokens[where].tolist()) == {IMAGE}
            if image.start >= sample.prompt_length:  # between the marks of vision, and not the model's
                assert not own[where].any()
                assert sample.tokens[image.start - 1] == 2 and sample.tokens[image.start + image.tokens] == 3
        assert checked(sample, prompt, sample.sample_index, False, VOCABULARY) == [sample]
    batch = Batch(samples, [torch.ones(sample.response_length) for sample in samples], temperature=1.0)
    scored = pool.score([sample.tokens for sample in samples], [sample.images for sample in samples])
    for ours, theirs, sample in zip(trainer.logprobs(batch), scored, samples, strict=True):
        mask = sample.loss_mask
        torch.testing.assert_close(ours[mask], sample.rollout_logprobs[mask], atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs[-sample.response_length :][mask], sample.rollout_logprobs[mask], atol=1e-4, rtol=0)
        with torch.no_grad():  # the third opinion: transformers' own forward with the pixels of all images
            logits = trainer.model(**reference_inputs(sample.tokens, sample.images), use_cache=False).logits[0]
        reference = logits.log_softmax(-1)[:-1].gather(-1, sample.tokens[1:, None])[-sample.response_length :, 0]
        torch.testing.assert_close(ours[mask], reference[mask], atol=1e-4, rtol=0)


def test_another_image_in_an_observation_changes_what_follows_and_nothing_before(
    pair: tuple[Config, TorchTrainer, LocalPool],
) -> None:
    cfg, trainer, pool = pair
    (sample,) = talk(conversing(cfg, _target_=f"{HERE}.three_turns"), pool, prompts(cfg)[:1])
    first, crop, last = sample.images
    other = dataclasses.replace(crop, pixels=255 - crop.pixels)
    changed = dataclasses.replace(sample, images=(first, other, last))
    batch = Batch([sample, changed], [torch.ones(sample.response_length)] * 2, temperature=1.0)
    one, two = trainer.logprobs(batch)
    at = crop.start - sample.prompt_length
    torch.testing.assert_close(one[:at], two[:at], atol=1e-5, rtol=0)
    assert (one[at + crop.tokens + 2 :] - two[at + crop.tokens + 2 :]).abs().max() > 1e-3


def test_gradients_reach_the_tower_through_the_image_of_an_observation_alone(
    pair: tuple[Config, TorchTrainer, LocalPool],
) -> None:
    cfg, _, pool = pair
    (sample,) = talk(conversing(cfg, _target_=f"{HERE}.three_turns"), pool, prompts(cfg)[2:])  # a prompt without images
    assert len(sample.images) == 2 and sample.images[0].start >= sample.prompt_length
    trainer = TorchTrainer(cfg)
    before = {name: master.clone() for name, master in trainer.optimizer.masters.items() if ".visual." in name}
    advantages = [torch.where(sample.loss_mask, 1.0, 0.0)]
    trainer.step(Batch([sample], advantages, temperature=1.0))
    moved = [name for name, master in before.items() if not torch.equal(master, trainer.optimizer.masters[name])]
    assert len(moved) > 0.8 * len(before)


def test_turns_go_on_from_cached_images_and_encode_new_ones_only(pair: tuple[Config, TorchTrainer, LocalPool]) -> None:
    cfg, _, pool = pair
    assert pool.model.visual is not None
    seen: list[int] = []
    handle = pool.model.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    pool.metrics()
    try:
        (sample,) = talk(conversing(cfg, _target_=f"{HERE}.three_turns"), pool, prompts(cfg)[:1])
    finally:
        handle.remove()
    assert seen == [4 * image.tokens for image in sample.images]  # four patches a token: each image once
    counted = pool.metrics()
    assert counted["perf/rollout_prefill_tokens"] + counted["perf/rollout_cached_tokens"] > len(sample.tokens)
    assert counted["perf/rollout_prefill_tokens"] <= len(sample.tokens)


def test_a_chat_template_writes_images_as_it_writes_texts(pair: tuple[Config, TorchTrainer, LocalPool]) -> None:
    cfg, _, _ = pair
    tokenizer = load_tokenizer(cfg.model)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = processor(cfg)
    written = Codec(tokenizer, tokenizer.decode, (END,), ObservationRole.tool, Pictures(made, 4, 1, 4096))
    ids, (image,) = written.observation(["<image>", noise_image(8, 16), made.mark], 100, False, True, place=50)
    text = tokenizer.decode(ids)
    assert ids.count(IMAGE) == 2 and image.start == 50 + ids.index(IMAGE)  # what a text names is a text
    assert text.startswith("<tool><image>") and text.endswith("<assistant>") and made.mark[1:] in text


# ---- what fails


def test_images_that_cannot_be_shown_end_their_sample_and_no_other(pair: tuple[Config, TorchTrainer, LocalPool]) -> None:
    cfg, _, pool = pair
    section = conversing(
        cfg, _target_=f"{HERE}.one_token_turns", environment=f"{HERE}.Wrong", max_images=4, max_observation_tokens=64, max_turns=2
    )
    base = prompts(cfg)[0]
    asked = [dataclasses.replace(base, prompt_id=f"p{i}", text=text) for i, text in enumerate(WRONG)]
    samples = talk(section, pool, asked)
    for sample, text in zip(samples, WRONG, strict=True):
        if text in REASONS:
            kind, reason = REASONS[text]
            assert sample.status is Status.failed and sample.info["failed"] == kind, (text, sample.finish_reason)
            assert re.search(reason, sample.finish_reason), sample.finish_reason
        else:
            assert sample.status is not Status.failed and len(sample.images) == 2
    counts = metrics(samples)
    assert counts["rollout/failed"] == len(REASONS) and counts["rollout/failed_image"] == 7


async def one_token_turns(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """An environment's observation after each of two tokens."""
    environment = context.environment()
    talk = context.start(prompt)
    before = await context.call(environment.reset, prompt)
    if before is not None:
        talk.observe(before)
    for _ in range(2):
        turn = await engine.generate(talk, max_tokens=1)
        if not talk.observe((await context.call(environment.step, turn.text))[0]):
            break
    return talk.sample()


def test_a_model_without_eyes_is_shown_nothing() -> None:
    blind = Codec(load_tokenizer(config().model), lambda ids: "", (END,), ObservationRole.none)
    with pytest.raises(Failed, match="no visual tower"):
        blind.observation([noise_image(8, 8)], 10, True, False, VOCABULARY)


def test_samples_of_a_rollout_function_are_checked() -> None:
    cfg = config()
    prompt = prompts(cfg)[1]
    transcript = Transcript(prompt, 0, "k", 1, codec(cfg), 50, 50)
    transcript.tokens += [60, END]
    transcript.mask, transcript.logprobs, transcript.raw = [True, True], [-1.0, -1.0], None
    transcript.turns = [{"by": "model", "text": "x", "start": 0, "stop": 2, "finish": "stop"}]
    sample = transcript.sample()
    assert checked(sample, prompt, 0, False, VOCABULARY) == [sample]
    one, two = sample.images
    for images, message in (
        ((one,), "prompt's images"),
        ((two, one), "prompt's images"),
        ((one, two, dataclasses.replace(two, start=two.start + 1)), "placeholders of its own"),
        ((one, two, dataclasses.replace(two, start=len(sample.tokens) - 2)), "placeholders of its own"),
    ):
        with pytest.raises(Failed, match=message):
            checked(dataclasses.replace(sample, images=images), prompt, 0, False, VOCABULARY)


# ---- task=geo3k_zoom


class Scripted:
    """An engine that says what it is told, turn by turn."""

    def __init__(self, *said: list[int]) -> None:
        self.said, self.requests = said, list[Request]()

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Sample]:
        for request in iter(requests):
            if request is None:
                continue
            new = [*self.said[len(self.requests) % len(self.said)], END]
            self.requests.append(request)
            yield Sample(
                request.prompt_id, request.sample_index, torch.tensor([*request.tokens, *new]), len(new),
                torch.ones(len(new), dtype=torch.bool), torch.full((len(new),), -1.0), Status.completed, "stop",
                weight_spans=[WeightSpan(0, 0, len(new))], images=request.images,
            )  # fmt: skip


def test_geometry_over_several_turns_shows_parts_of_the_diagram_at_full_size(tmp_path: Path) -> None:
    file = io.BytesIO()
    diagram = noise_image(120, 200, seed=3)
    Image.fromarray(diagram).save(file, "PNG")
    row = {"problem": "<image>Find x.", "answer": "12", "image_base64": base64.b64encode(file.getvalue()).decode()}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    small = [
        "task.min_image_pixels=64",
        "task.max_image_pixels=1024",
        "task.max_prompt_tokens=500",
        "model.max_context_tokens=2048",
    ]
    paths = [f"task.{split}_path={tmp_path / 'data.jsonl'}" for split in ("train", "eval")]
    cfg = config("task=geo3k_zoom", *small, *paths, "task.rollout.observation_role=none", "algorithm.prompts_per_step=1")
    tokenizer = load_tokenizer(cfg.model)
    task = Geo3kTask(cfg.task, tokenizer, processor(cfg))  # type: ignore[arg-type]
    call = '<tool_call>{"name": "zoom", "arguments": {"image": 1, "box": [500, 0, 620, 200]}}</tool_call>'
    spoken = [tokenizer(text, add_special_tokens=False).input_ids for text in (call, "so \\boxed{12}")]
    pool = Scripted(*spoken)
    made = Collector(cfg, task, pool, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), (END,), lambda: False,
                     pytest.fail, tokenizer)  # type: ignore[arg-type]  # fmt: skip
    params = SamplingParams(1.0, 600, stop_token_ids=(END,))
    (sample,) = made.generate(task.train_prompts(0, 1), 1, params, 0, capture_routes=False)
    assert sample.reward == 1.0 and sample.finish_reason == "done" and len(sample.images) == 2
    shown, part = sample.images
    assert shown.grid == (3, 5) and part.grid == (3, 3)  # 120 x 200 pixels reduced; 24 x 24 of them as they are
    assert np.array_equal(part.pixels, diagram[:24, 100:124])
    assert pool.requests[1].images == sample.images and sample.info["turns"][1]["images"] == 1
