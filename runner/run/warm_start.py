"""Supervised warm start: a random tiny model learns the format of worked solutions before RL takes over.

The result is cached under `outputs/.warm_start/<hash>` by everything it depends on: the model, the task, the precision,
the optimizer, the seed and the version of this package's training code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from runner import __version__, storage
from runner.config.schema import Config
from runner.data import SamplingParams
from runner.errors import Failure, UserError
from runner.models.images import Images
from runner.run.collect import Collector, Interrupted
from runner.run.sync import WeightSync
from runner.tasks.protocol import HasWorkedSolutions, Task
from runner.tracking.base import Tracker
from runner.tracking.folder import plain_config
from runner.trainer.protocol import Trainer

CHECK_PROMPTS = 128  # training prompts sampled once each to measure success: its standard error is .04
CONFIRM_PROMPTS = 512  # others, before it stops (.02): a lucky look must not end the warm start early
FORMAT = 2  # raised when a change of code makes older caches wrong


def cache_key(cfg: Config) -> str:
    """Hash of what the warm start depends on; nothing of rollout, speculation or tracking."""
    config = plain_config(cfg, secrets=True)
    parts = {
        **{name: config[name] for name in ("model", "task", "precision", "trainer", "warm_start", "seed")},
        "sampling": config["rollout"]["sampling"],
        "version": f"{__version__}/{FORMAT}",
        "torch": torch.__version__,
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warm_start(
    cfg: Config,
    trainer: Trainer,
    collector: Collector,
    sync: WeightSync,
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int,
    tracker: Tracker,
    should_stop: Callable[[], bool],
) -> None:
    """Train on worked solutions until sampled success reaches `warm_start.stop_at_reward`, or load that from the cache."""
    folder = Path(cfg.outputs_dir) / ".warm_start" / cache_key(cfg)
    if cfg.warm_start.cache and (folder / "done.json").is_file():
        summary = _load(trainer, folder)
        trainer.reset_optimizer()
        trainer.version = 0
        tracker.event("warm_start", f"warm start loaded from {folder}", summary)
        return
    summary = _train(cfg, trainer, collector, sync, tokenizer, end_token_id, tracker, should_stop)
    trainer.reset_optimizer()
    trainer.version = 0
    tracker.event("warm_start", "warm start: {reward:.2f} sampled success after {steps} steps".format(**summary), summary)
    if cfg.warm_start.cache:
        try:
            with storage.new_folder(folder) as partial:
                trainer.save(partial)
                (partial / "done.json").write_text(json.dumps(summary))
        except OSError as error:
            if not (folder / "done.json").is_file():  # else another run of a sweep was first
                tracker.event("warning", f"the warm start could not be cached under {folder}: {error.strerror}", {})


def _load(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """What the warm start reached. A damaged one is refused: the trainer may have taken up half of it."""
    try:
        summary = json.loads((folder / "done.json").read_bytes())
        if not isinstance(summary, dict):
            raise ValueError("done.json is no mapping")
        trainer.load(folder)
    except Failure:
        raise
    except (UserError, OSError, ValueError, KeyError, RecursionError) as error:
        problem = error.problem if isinstance(error, UserError) else str(error)
        raise UserError(
            f"the cached warm start {folder} is damaged: {problem}",
            key="warm_start.cache",
            fix="remove that folder: it is made again",
        ) from error
    return summary


def _train(
    cfg: Config,
    trainer: Trainer,
    collector: Collector,
    sync: WeightSync,
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int,
    tracker: Tracker,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    section = cfg.warm_start
    corpus = _tokenize(collector.task, tokenizer, end_token_id, section.max_steps * section.batch_size, cfg.task.seed)
    order = np.random.default_rng(cfg.seed).permutation(len(corpus))
    reward, steps = 0.0, 0
    with tracker.progress("warm start", section.max_steps) as progress:
        for step in range(section.max_steps):
            picks = [corpus[order[(step * section.batch_size + i) % len(corpus)]] for i in range(section.batch_size)]
            # Warm-up over 20 steps: Adam's second moments are noise before that.
            pairs, images = [(tokens, prompt) for tokens, prompt, _ in picks], [shown for *_, shown in picks]
            metrics = trainer.sft_step(pairs, lr=section.lr * min(1.0, (step + 1) / 20), images=images)
            steps = step + 1
            progress.advance(1, f"loss {metrics['sft/loss']:.3f}  success {reward:.2f}")
            if should_stop():
                raise Interrupted
            if steps % section.check_interval_steps == 0 or steps == section.max_steps:
                sync()
                reward = _success(cfg, collector, steps, CHECK_PROMPTS, 0)
                if reward >= section.stop_at_reward:
                    reward = _success(cfg, collector, steps, CONFIRM_PROMPTS, 1)
                if reward >= section.stop_at_reward:
                    break
    return {"reward": reward, "steps": steps}


def _success(cfg: Config, collector: Collector, step: int, prompts: int, round: int) -> float:
    """The mean reward of one sample each of `prompts` training prompts, with the weights that the engine has."""
    sampling = SamplingParams(
        temperature=cfg.rollout.sampling.temperature,
        max_response_tokens=cfg.rollout.sampling.max_response_tokens,
        stop_token_ids=collector.stop_token_ids,
    )
    asked = collector.task.train_prompts(step, prompts, round)
    samples = collector.generate(asked, 1, sampling, step=-1_000_000 - step, capture_routes=False)
    return sum(sample.reward or 0.0 for sample in samples) / len(samples)


def _tokenize(
    task: Task, tokenizer: PreTrainedTokenizerBase, end_token_id: int, count: int, seed: int
) -> list[tuple[torch.Tensor, int, Images]]:
    """(tokens of prompt and solution, prompt length, images) of `count` worked solutions."""
    if not isinstance(task, HasWorkedSolutions):
        raise UserError(
            f"task {task.name} has no worked solutions to warm-start from",
            key="warm_start.enabled",
            fix="warm_start.enabled=false",
        )
    pairs = task.worked_solutions(count, seed)
    texts = tokenizer([prompt if isinstance(prompt, str) else "" for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    prompts = [text if isinstance(prompt, str) else list(prompt.tokens) for text, (prompt, _) in zip(texts, pairs, strict=True)]
    images = [() if isinstance(prompt, str) else prompt.images for prompt, _ in pairs]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    rows = zip(prompts, answers, images, strict=True)
    return [(torch.tensor(p + a + [end_token_id]), len(p), shown) for p, a, shown in rows]
