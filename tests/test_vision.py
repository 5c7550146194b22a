"""Images from file to logprob: patches, placeholders, positions, both engines' features, visual_count and rules."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_local_engine import FP32, exported
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from runner.config import compose
from runner.config.schema import Config, Role
from runner.data import Batch, Request, Sample, SamplingParams
from runner.errors import UserError
from runner.models.build import build_model, load_tokenizer
from runner.models.images import ImageProcessor, Images, PlacedImage, image_processor, rotary_positions
from runner.models.pictures import resized
from runner.models.visual import ImageFeatures, hidden_states
from runner.precision.plan import PrecisionPlan
from runner.rollout.local import LocalPool
from runner.run import samples as kept
from runner.run.collect import Collector
from runner.run.sync import _probe_batch
from runner.tasks.protocol import Prompt
from runner.tasks.visual_count import VisualCountTask, draw
from runner.trainer.protocol import StepResult
from runner.trainer.torch.trainer import TorchTrainer
from tests.configs import problems

IMAGE = 4  # id of the placeholder


@lru_cache
def config(*overrides: str) -> Config:
    return compose.load_config(
        ["model=tiny_vlm", "model.num_layers=2", "rollout.max_concurrency=16", "trainer.threads=1", *overrides]
    )


def processor(cfg: Config) -> ImageProcessor:
    return image_processor(cfg.model, load_tokenizer(cfg.model))


def counting(*overrides: str) -> VisualCountTask:
    cfg = config(*overrides)
    return VisualCountTask(cfg.task, load_tokenizer(cfg.model), processor(cfg))  # type: ignore[arg-type]


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_inputs(tokens: torch.Tensor, images: Images) -> dict[str, Any]:
    """What transformers' own forward takes: pixels, grids, and which tokens are an image's."""
    if not images:
        return {"input_ids": tokens[None]}
    kinds = torch.zeros_like(tokens)
    for image in images:
        kinds[image.start : image.start + image.tokens] = 1
    return {
        "input_ids": tokens[None],
        "pixel_values": torch.cat([image.patches() for image in images]),
        "image_grid_thw": torch.tensor([image.grid_thw for image in images]),
        "mm_token_type_ids": kinds[None],
    }


def requests(prompts: list[Prompt], samples: int = 1, tokens: int = 12, temperature: float = 1.0) -> list[Request]:
    params = SamplingParams(temperature, tokens, stop_token_ids=(1,))
    return [
        Request(p.prompt_id, i, p.tokens, params, seed=100 * n + i, images=p.images)
        for n, p in enumerate(prompts)
        for i in range(samples)
    ]


def mixed_prompts(cfg: Config) -> list[Prompt]:
    """Prompts with images of three sizes, two that differ in nothing but the image, two with several, and one without any."""
    made = processor(cfg)
    prompts = []
    for number, (height, width) in enumerate([(32, 32), (32, 32), (16, 40), (48, 8)]):
        tokens, images = made.place([30, 31, IMAGE, 32, 33, 34], [noise_image(height, width, number)])
        prompts.append(Prompt(f"p{number}", "", tuple(tokens), "", {}, images))
    for number, sides in enumerate([((16, 40), (8, 24)), ((8, 24), (16, 40), (24, 8))]):
        shown = [noise_image(*side, seed) for seed, side in enumerate(sides)]
        tokens, images = made.place([30, IMAGE, 31, *[IMAGE, 35] * (len(sides) - 1), 32], shown)
        prompts.append(Prompt(f"several{number}", "", tuple(tokens), "", {}, images))
    return [*prompts, Prompt("text", "", (30, 31, 32, 33), "")]


def in_order(pool: LocalPool, asked: list[Request]) -> list[Sample]:
    by_key = {(sample.prompt_id, sample.sample_index): sample for sample in pool.generate(asked)}
    return [by_key[request.prompt_id, request.sample_index] for request in asked]


@pytest.fixture(scope="module")
def fp32() -> tuple[LocalPool, torch.nn.Module, Config]:
    cfg = config(*FP32, "rollout.prefill_chunk_tokens=24")  # prefills are cut in the middle of images
    pool = LocalPool(cfg)
    built, items = exported(cfg, spread=1.5)
    assert pool.update_weights(0, iter(items)).problems == []
    return pool, built, cfg


# -- patches, placeholders, positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 61), (5, 90), (300, 180), (8, 8)])
def test_pixels_become_the_patches_of_transformers_own_processor(height: int, width: int) -> None:
    least, most = 1024, 8192
    theirs = Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=least,
        max_pixels=most,
    )
    picture = Image.fromarray(noise_image(height, width))
    expected = theirs([picture], return_tensors="pt")
    made = processor(config())
    high, wide = made.fitted_size(height, width, least, most)
    image = PlacedImage(resized(picture, high, wide), 0, made.tower)
    assert expected["image_grid_thw"].tolist() == [list(image.grid_thw)]
    assert torch.equal(expected["pixel_values"], image.patches())


def test_far_too_long_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 200 times"):
        processor(config()).fitted_size(3, 900, 1024, 4096)


def test_a_placeholder_becomes_as_many_tokens_as_the_image_has() -> None:
    made = processor(config())
    tokens, (image,) = made.place([7, IMAGE, 8], [noise_image(16, 24)])
    assert tokens == [7, *[IMAGE] * 6, 8] and image.extent == (1, 2, 3)
    tokens, images = made.place([IMAGE, 7, IMAGE], [noise_image(8, 8), noise_image(8, 16)], first=5)
    assert tokens == [IMAGE, 7, IMAGE, IMAGE] and [image.start for image in images] == [5, 7]
    pixels = [image.pixels for image in images]
    assert [image.start for image in made.at([9] * 5 + tokens, pixels)] == [5, 7]
    for wrong in ([7, 8], [IMAGE, IMAGE]):
        with pytest.raises(ValueError, match="not 1"):
            made.place(wrong, [noise_image(8, 8)])


@pytest.mark.parametrize(
    "extent", [[(1, 4, 4)], [(0, 1, 5)], [(3, 6, 1)], [(1, 4, 4), (19, 2, 3)], [(0, 1, 5), (6, 6, 1), (14, 2, 2)]]
)
def test_rotary_positions_are_those_of_transformers(extent: list[tuple[int, int, int]]) -> None:
    cfg = config()
    built = build_model(cfg.model, dtype=torch.float32, seed=0)
    last = extent[-1]
    total = last[0] + last[1] * last[2] + 7
    kinds = torch.zeros(1, total, dtype=torch.int64)
    for start, rows, columns in extent:
        kinds[0, start : start + rows * columns] = 1
    grid = torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in extent])
    expected, delta = built.base_model.get_rope_index(torch.ones(1, total, dtype=torch.int64), kinds, image_grid_thw=grid)
    ours = rotary_positions(np.arange(total), np.array(extent))
    assert np.array_equal(ours, expected[:, 0].numpy())
    assert ours[0, -1] - (total - 1) == int(delta)
    padded = rotary_positions(np.arange(total), np.array([*extent, (0, 0, 0)]))
    assert np.array_equal(ours, padded)
    assert np.array_equal(rotary_positions(np.arange(9), np.zeros((1, 3), np.int64)), np.tile(np.arange(9), (3, 1)))
    assert np.array_equal(rotary_positions(np.arange(9), np.zeros((0, 3), np.int64)), np.tile(np.arange(9), (3, 1)))


# -- forward: trainer's, engine's, transformers' --------------------------------------------------------------------------


def test_batched_hidden_states_equal_transformers_one_by_one(fp32: tuple[LocalPool, torch.nn.Module, Config]) -> None:
    _, built, cfg = fp32
    prompts = mixed_prompts(cfg)
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.tokens) for p in prompts], batch_first=True)
    with torch.no_grad():
        ours = hidden_states(built, tokens, [p.images for p in prompts])
        for row, prompt in enumerate(prompts):
            ids = torch.tensor(prompt.tokens)
            expected = built.base_model(**reference_inputs(ids, prompt.images), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(ours[row, : len(ids)], expected, atol=2e-5, rtol=0)


def test_an_image_is_encoded_once_for_all_rows_that_show_it() -> None:
    cfg = config()
    built = build_model(cfg.model, dtype=torch.float32, seed=0)
    seen: list[int] = []
    built.base_model.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    first, second = (PlacedImage(noise_image(16, 16, seed), 1, processor(cfg).tower) for seed in range(2))
    features = ImageFeatures(built.base_model.visual, [(first,), (second,), (first,), (), (first,)])
    assert seen == [2 * 16]
    placed = features.placed([(first,), (), (first,)], [0, 0, 3], [9, 9, 9], [0, 9, 18])
    assert placed is not None and placed.where.tolist() == [1, 2, 3, 4, 18, 19]
    assert torch.equal(placed.embeds[2:4], placed.embeds[4:6])


def test_greedy_tokens_and_logprobs_are_those_of_transformers_generate(fp32: tuple[LocalPool, torch.nn.Module, Config]) -> None:
    pool, built, cfg = fp32
    prompts = mixed_prompts(cfg)
    for prompt, sample in zip(prompts, in_order(pool, requests(prompts, temperature=0.0)), strict=True):
        ids = torch.tensor(prompt.tokens)
        with torch.no_grad():
            made = built.generate(
                **reference_inputs(ids, prompt.images),
                max_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=1,
            )
        assert sample.tokens.tolist() == made.sequences[0].tolist()
        logprobs = torch.cat(made.logits).log_softmax(-1).gather(-1, sample.response_tokens[:, None])[:, 0]
        torch.testing.assert_close(sample.rollout_logprobs, logprobs, atol=1e-4, rtol=0)


def test_prompts_that_differ_in_the_image_alone_are_different(fp32: tuple[LocalPool, torch.nn.Module, Config]) -> None:
    pool, _, cfg = fp32
    first, second = mixed_prompts(cfg)[:2]
    assert first.tokens == second.tokens
    one, two = in_order(pool, requests([first, second], temperature=0.0))
    assert not torch.equal(one.rollout_logprobs[:1], two.rollout_logprobs[:1])


def test_trainer_and_engine_agree_and_samples_share_their_image() -> None:
    cfg = config(*FP32, "trainer.max_tokens_per_gpu=128")  # several micro-batches, images of several sizes in one
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    for master in trainer.optimizer.masters.values():
        master.copy_(master.to(torch.bfloat16))  # what is exported
    trainer._write_weights()
    assert pool.update_weights(0, trainer.export()).problems == []
    prompts = mixed_prompts(cfg)
    samples = in_order(pool, requests(prompts, samples=3))
    assert all(sample.images is prompts[i // 3].images for i, sample in enumerate(samples))
    batch = Batch(samples, [torch.ones(sample.response_length) for sample in samples], temperature=1.0)
    for ours, sample in zip(trainer.logprobs(batch), samples, strict=True):
        torch.testing.assert_close(ours, sample.rollout_logprobs, atol=1e-4, rtol=0)
    images = [prompt.images for prompt in prompts]
    probe = [torch.tensor(prompt.tokens) for prompt in prompts]
    for ours, theirs in zip(trainer.logprobs(_probe_batch(probe, images)), pool.score(probe, images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_placeholder_that_the_policy_samples_is_an_ordinary_token(fp32: tuple[LocalPool, torch.nn.Module, Config]) -> None:
    pool, built, cfg = fp32
    prompt = mixed_prompts(cfg)[0]
    tokens = torch.tensor([*prompt.tokens, IMAGE, 40, IMAGE, 41])
    with torch.no_grad():
        hidden = hidden_states(built, tokens[None], [prompt.images])[0]
        expected = built.get_output_embeddings()(hidden)[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(pool.score([tokens], [prompt.images])[0], expected, atol=1e-4, rtol=0)


def test_n_gram_proposals_change_nothing() -> None:
    prompts = mixed_prompts(config(*FP32))
    plain, proposing = (
        config(*FP32[:2], "rollout.device=cpu", f"speculative={method}", "speculative.auto_disable=false")
        for method in ("none", "ngram")
    )
    made = []
    for cfg in (plain, proposing):
        pool = LocalPool(cfg)
        pool.update_weights(0, iter(exported(cfg, spread=1.5)[1]))
        made.append((in_order(pool, requests(prompts, samples=2, tokens=30, temperature=0.3)), pool.metrics()))
    assert made[1][1]["rollout/spec_proposed_tokens"] > 0
    for one, two in zip(made[0][0], made[1][0], strict=True):
        assert torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.rollout_logprobs, two.rollout_logprobs, atol=1e-4, rtol=0)


def test_new_weights_in_the_middle_of_a_run_see_the_image_again() -> None:
    cfg = config(*FP32)
    prompt = mixed_prompts(cfg)[0]
    (old, _), (new, items) = (exported(cfg, seed=seed, spread=1.5) for seed in (1, 2))
    pool = LocalPool(cfg)
    pool.update_weights(0, iter(exported(cfg, seed=1, spread=1.5)[1]))
    asked = [dataclasses.replace(requests([prompt], tokens=length)[0], sample_index=length, seed=5) for length in (3, 12)]
    running = pool.generate(asked)
    next(running)
    pool.update_weights(1, iter(items))
    late = next(running)
    switch = late.weight_spans[1].start
    assert switch == 3 and late.weight_spans[1].version == 1
    with torch.no_grad():
        hidden = hidden_states(new, late.tokens[None], [prompt.images])[0, late.prompt_length - 1 : -1]
        expected = new.get_output_embeddings()(hidden).log_softmax(-1).gather(-1, late.response_tokens[:, None])[:, 0]
    torch.testing.assert_close(late.rollout_logprobs[switch:], expected[switch:], atol=1e-4, rtol=0)


# -- training --------------------------------------------------------------------------------------------------------------


def test_quantization_leaves_the_tower_alone_and_training_moves_it(tmp_path: Path) -> None:
    cfg = config("speculative=none")
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "train")
    quantized = {name for name in plan.tensors if plan.format_of(name).quantized}
    assert quantized and all(plan.parameters[name].role is Role.dense_mlp for name in quantized)
    task = counting("speculative=none")
    trainer, pool = TorchTrainer(cfg), LocalPool(cfg)
    before = {name: tensor.clone() for name, tensor in trainer.unquantized_weights().items()}
    prompts = task.train_prompts(0, 2)
    picks = [(torch.tensor([*p.tokens, 60, 61, 1]), len(p.tokens)) for p in prompts]
    trainer.sft_step(picks, 1e-3, [p.images for p in prompts])
    vision = [name for name in before if ".visual." in name]
    moved = [name for name in vision if not torch.equal(before[name], trainer.unquantized_weights()[name])]
    still = set(vision) - set(moved)
    assert len(moved) > 0.8 * len(vision), still
    assert pool.update_weights(1, trainer.export()).problems == []
    folder = tmp_path / "saved"
    folder.mkdir()
    trainer.save(folder)
    again = TorchTrainer(cfg)
    again.load(folder)
    for one in (trainer, again):
        one.sft_step(picks, 1e-3, [p.images for p in prompts])
    assert all(torch.equal(trainer.optimizer.masters[name], again.optimizer.masters[name]) for name in before)


def test_transformers_loads_model_and_image_processor_from_a_checkpoint(tmp_path: Path) -> None:
    cfg = config("speculative=none")
    trainer = TorchTrainer(cfg)
    trainer.save(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tower = dict(loaded.named_parameters())["model.visual.patch_embed.proj.weight"]
    assert torch.equal(tower.to(torch.bfloat16), trainer.unquantized_weights()["model.visual.patch_embed.proj.weight"])
    picture = Image.fromarray(noise_image(48, 32))
    expected = AutoImageProcessor.from_pretrained(tmp_path)([picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(PlacedImage(np.asarray(picture), 0, processor(cfg).tower).patches(), expected)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(recompute: str) -> None:
    task = counting(*FP32)
    prompts = task.train_prompts(0, 2)
    picks = [(torch.tensor([*p.tokens, 60, 61, 1]), len(p.tokens)) for p in prompts]
    masters = []
    for kind in ("none", recompute):
        trainer = TorchTrainer(config(*FP32, f"trainer.recompute={kind}"))
        trainer.sft_step(picks, 1e-3, [p.images for p in prompts])
        masters.append(trainer.optimizer.masters)
    for name in masters[0]:
        torch.testing.assert_close(masters[0][name], masters[1][name], atol=1e-6, rtol=0)


def test_prompts_with_images_become_rewarded_samples_and_no_row_of_a_log_holds_pixels() -> None:
    cfg = config("speculative=none")
    trainer, pool, task = TorchTrainer(cfg), LocalPool(cfg), counting("speculative=none")
    assert pool.update_weights(0, trainer.export()).problems == []
    tokenizer = load_tokenizer(cfg.model)
    collector = Collector(cfg, task, pool, tokenizer.decode, (tokenizer.eos_token_id,), lambda: False, warn=pytest.fail)
    params = SamplingParams(1.0, 8, stop_token_ids=collector.stop_token_ids)
    prompts = task.train_prompts(0, 3)
    samples = collector.generate(prompts, 2, params, 0, capture_routes=False)
    assert [sample.images for sample in samples] == [prompt.images for prompt in prompts for _ in range(2)]
    assert all(sample.reward == 0.0 and sample.info["prompt"].startswith("<image>how many") for sample in samples)
    advantages = [torch.zeros(sample.response_length) for sample in samples]
    update = StepResult({}, [sample.rollout_logprobs for sample in samples], old_version=0)
    rows = kept.rows(Batch(samples, advantages, 1.0), update, tokenizer.decode)
    assert len(rows) == len(samples) and all(len(json.dumps(row)) < 2000 for row in rows)


# -- task=visual_count -------------------------------------------------------------------------------------------------------


def test_scenes_depend_on_seed_split_and_index_alone() -> None:
    one, two, other = counting(), counting(), counting("task.seed=9")
    two.eval_prompts(5), two.worked_solutions(3, 1)
    for a, b, c in zip(one.train_prompts(3, 4), two.train_prompts(3, 4), other.train_prompts(3, 4), strict=True):
        assert (a.text, a.tokens, a.answer) == (b.text, b.tokens, b.answer)
        (mine,), (again,), (others,) = a.images, b.images, c.images
        assert np.array_equal(mine.pixels, again.pixels) and not np.array_equal(mine.pixels, others.pixels)
    assert one.train_prompts(3, 2)[1].answer == one.train_prompts(3, 9)[1].answer  # how many are asked for does not matter
    held = [image.pixels.tobytes() for prompt in one.eval_prompts(256) for image in prompt.images]
    assert held == [image.pixels.tobytes() for prompt in other.eval_prompts(256) for image in prompt.images]
    assert len(set(held)) == 256


def test_answers_are_even_and_solutions_are_right() -> None:
    task = counting()
    pairs = task.worked_solutions(400, seed=1)
    answers = [int(prompt.answer) for prompt, _ in pairs if isinstance(prompt, Prompt)]
    assert set(answers) == set(range(5)) and max(answers.count(value) for value in range(5)) < 110
    for prompt, solution in pairs:
        assert isinstance(prompt, Prompt)
        rows, _, total = solution.partition("=")
        assert sum(map(int, rows.split("+"))) == int(total) == int(prompt.answer)
        assert task.reward(prompt, solution) == 1.0 and task.reward(prompt, rows) == 0.0
        assert task.reward(prompt, f"{rows}={int(total) + 1}") == 0.0


def test_pixels_show_what_is_counted() -> None:
    """Without noise the cells whose pixels have the colour, in a filled box or not, are those that the answer counts."""
    task = counting("task.noise=0", "task.clutter=1.0", "task.cell_pixels=16", "task.max_prompt_tokens=120")
    for scene in task._held_out[:40]:
        pixels, cell = draw(scene, task.cfg), task.cfg.cell_pixels
        found = 0
        for place in range(9):
            part = pixels[place // 3 * cell :, place % 3 * cell :][:cell, :cell].astype(int)
            hot = part.argmax(-1) == {"red": 0, "green": 1, "blue": 2}[scene.wanted[0]]
            hot &= part.max(-1) != part.min(-1)
            if hot.any():
                rows, columns = np.nonzero(hot.any(1))[0], np.nonzero(hot.any(0))[0]
                full = hot.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
                found += full == (scene.wanted[1] == "square")
        assert found == scene.count


# -- rules ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "said", "fix"),
    [
        ("task=visual_count", "model", "tiny_moe has no visual tower", "model=tiny_vlm"),
        ("model=tiny_vlm trainer=megatron parallelism=cpu2", "model", "no vision towers", "trainer=torch"),
        ("model=tiny_vlm rollout=sglang speculative=none", "rollout", "tokens, not images", "rollout=local"),
        ("model=tiny_vlm speculative=draft speculative.draft_model=x", "speculative", "does not see", "speculative=ngram"),
        ("model=tiny_vlm model.vision=false", "model.vision", "has a visual tower", "model.vision=true"),
        ("model=tiny_dense model.vision=true", "model.vision", "has no visual tower", "model.vision=false"),
        ("model=tiny_vlm model.hidden_size=72", "model.hidden_size", "into multiples of 4", "model.hidden_size=80"),
        ("model=tiny_vlm task.grid=16", "task.grid", "258 tokens", "max_prompt_tokens=290"),
        ("model=tiny_vlm task.max_prompt_tokens=220", "rollout.sampling.max_response_tokens", "longer than the context", "=36"),
        ("model=tiny_vlm task.cell_pixels=5", "task.cell_pixels", "at least 7", "task.cell_pixels=7"),
        ("model=tiny_vlm task.colors=5", "task.colors", "at most 4", "task.colors=4"),
        ("model=tiny_vlm task.max_count=17", "task.max_count", "17 shapes in 3 x 3", "task.max_count=3"),
        ("model=tiny_vlm task.clutter=1.5", "task.clutter", "at most 1", "task.clutter=1"),
        ("model=tiny_vlm evaluation.num_prompts=300", "evaluation.num_prompts", "256 are held out", "eval_problems=300"),
        ("model=tiny_vlm task=geo3k", "task.train_path", "from a file", "file.jsonl"),
        ("model=tiny_vlm task=geo3k task.max_image_pixels=401408", "task.max_image_pixels", "6274 tokens", "=6144"),
        ("model=tiny_vlm task=geo3k task.min_image_pixels=3", "task.min_image_pixels", "one token is 8 x 8", "=64"),
        ("model=tiny_vlm task=visual_cuont", "task", "no option visual_cuont", "task=visual_count"),
    ],
)
def test_rules(overrides: str, key: str, said: str, fix: str) -> None:
    found = problems(*overrides.split())
    about = [error for error in found if error.key == key and said in error.problem]
    assert about and fix in (about[0].fix or ""), "\n".join(map(str, found))


def test_cells_that_cut_image_tokens_are_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError, match="an image token is 8 pixels wide") as caught:
        counting("task.grid=3", "task.cell_pixels=9")
    assert caught.value.fix == "task.cell_pixels=16"


def test_a_vision_model_may_read_text_alone() -> None:
    assert compose.load_config(["model=tiny_vlm", "task=arithmetic"]).task.name == "arithmetic"
