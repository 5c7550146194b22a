"""What a rollout function returned, looked at before anything is trained on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from runner.data import Sample, Status, WeightSpan
from runner.errors import told
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import no_reward
from runner.turns.failure import Failed
from runner.turns.transcript import plain


def checked(result: object, prompt: Prompt, sample_index: int, wants_routes: bool, vocabulary: int) -> list[Sample]:
    """The samples that a rollout function returned. Failed for anything that could not be trained on.

    `vocabulary`: ids that the model has.
    """
    found = result if isinstance(result, list) else [result]
    samples = [sample for sample in found if isinstance(sample, Sample)]
    if not samples or len(samples) < len(found):
        kind = f"a list of {len(found)}" if isinstance(result, list) else type(result).__name__
        raise Failed("rubbish", f"the rollout function returned {kind}, not a Sample or a list of them")
    if len(set(map(id, samples))) < len(samples):
        raise Failed("rubbish", "the rollout function returned one sample twice")
    for sample in samples:
        try:
            problem = next(_problems(sample, prompt, sample_index, wants_routes, vocabulary), None)
        except Exception as error:  # a field may hold anything, and fail at whatever it is asked
            problem = f"the sample cannot be read: {told(error)}"
        if problem:
            raise Failed("rubbish", problem)
        sample.info = plain(sample.info)  # it goes into checkpoints and pages
    return samples


def _problems(sample: Sample, prompt: Prompt, sample_index: int, wants_routes: bool, vocabulary: int) -> Iterator[str]:
    yield from _rows(sample)
    total, response = len(sample.tokens), sample.response_length
    if sample.prompt_id != prompt.prompt_id or sample.sample_index != sample_index:
        yield "the sample names another prompt or another number than its own"
    if tuple(sample.tokens[: total - response].tolist()) != tuple(prompt.tokens):
        yield "the sample does not begin with its prompt's tokens"
    if not response or not bool(sample.loss_mask.any()):
        yield "the sample has no token of the model"
    if not 0 <= int(sample.tokens.min()) <= int(sample.tokens.max()) < vocabulary:
        yield f"the sample has tokens outside the vocabulary of {vocabulary}"
    if not bool(sample.rollout_logprobs.isfinite().all()):
        yield "the sample has logprobs that are not finite"
    if wants_routes and sample.routes is None:
        yield "the sample has no routes, although router replay is on"
    yield from _images(sample, prompt)
    yield from _rewards(sample)
    if sample.status not in (Status.completed, Status.truncated):
        yield f"the sample's status is {sample.status}, not completed or truncated"
    if not isinstance(sample.info, dict) or not isinstance(sample.finish_reason, str):
        yield "the sample's info is no dict, or its finish_reason no text"
    for turn in sample.info.get("turns", ()):
        if not isinstance(turn.get("text"), str) or turn.get("by") not in ("model", "environment"):
            yield "a turn in the sample's info is not {by: model or environment, text: ..}"
    for span in sample.weight_spans:
        if not isinstance(span, WeightSpan) or not 0 <= span.start <= span.stop <= response:
            yield f"the sample has a weight span outside its {response} response tokens"


def _rows(sample: Sample) -> Iterator[str]:
    """Types and lengths of what is aligned."""
    kinds = {"tokens": torch.int64, "loss_mask": torch.bool, "rollout_logprobs": torch.float32}
    if sample.raw_logprobs is not None:
        kinds["raw_logprobs"] = torch.float32
    for name, dtype in kinds.items():
        value = getattr(sample, name)
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() != 1:
            kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            yield f"the sample's {name} are {kind}, not one row of {dtype}"
    total, response = len(sample.tokens), sample.response_length
    rows = total - 1 if sample.routes is None else len(sample.routes)
    lengths = {len(getattr(sample, name)) for name in kinds if name != "tokens"}
    if lengths != {response} or not response <= total or rows != total - 1:
        counts = f"{len(sample.loss_mask)} mask entries, {len(sample.rollout_logprobs)} logprobs and {rows} rows of routes"
        yield f"the sample has {counts} for {response} response tokens of {total}"


def _images(sample: Sample, prompt: Prompt) -> Iterator[str]:
    """The prompt's come first, and all lie one after the other inside the sample."""
    if sample.images[: len(prompt.images)] != prompt.images:
        yield "the sample does not begin with its prompt's images"
    after = 0
    for image in sample.images:
        there = set(sample.tokens[image.start : image.start + image.tokens].tolist())
        if image.start < after or image.start + image.tokens > len(sample.tokens) or len(there) != 1:
            yield f"an image at token {image.start} of the sample does not stand on placeholders of its own"
        after = image.start + image.tokens


def _rewards(sample: Sample) -> Iterator[str]:
    penalties = sample.info.get("penalties", {})
    given = [*sample.rewards.items(), *penalties.items(), *((name, value) for _, name, value in sample.turn_rewards)]
    for name, value in [*given, *([("of the sample", sample.reward)] if sample.reward is not None else [])]:
        if not isinstance(name, str):
            yield f"a part of the sample's reward is named by a {type(name).__name__}"
        if problem := no_reward(value):
            yield f"the reward {name} {problem}"
    if not math.isfinite(sum(sample.rewards.values())):
        yield "the parts of the sample's reward add up to no finite number"
