"""What is kept of a step's samples for people: `rollouts/step_N.jsonl`, `runner show`, the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runner.data import Batch, Sample
from runner.tracking.pictures import name as named
from runner.trainer.protocol import StepResult

if TYPE_CHECKING:
    import numpy as np

KEPT = 8  # samples per step, of as many prompts as there are
WORST = 5  # tokens per sample
MAX_TOKENS = 1024  # of a sample that are kept one by one
MAX_TURN_CHARACTERS = 20_000


def rows(batch: Batch, update: StepResult, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """A JSON-serializable row of some of the samples that a step trained on."""
    names = _names(batch)
    return [_row(batch, update, place, decode, names) for place in _spread(batch)]


def pictures(batch: Batch) -> dict[str, np.ndarray]:
    """The images of these samples by the names that their rows have for them; one that several show has one."""
    shown = {id(image): image for place in _spread(batch) for image in batch.samples[place].images}
    return {name: shown[key].pixels for key, name in _names(batch).items()}


def _spread(batch: Batch) -> list[int]:
    places = list(range(len(batch.samples)))
    return places[:: max(1, len(places) // KEPT)][:KEPT]


def _names(batch: Batch) -> dict[int, str]:
    """File name by the id of an image."""
    shown = {id(image): image for place in _spread(batch) for image in batch.samples[place].images}
    return {key: named(number, image.pixels) for number, (key, image) in enumerate(shown.items())}


def _row(
    batch: Batch, update: StepResult, place: int, decode: Callable[[list[int]], str], names: dict[int, str]
) -> dict[str, Any]:
    sample = batch.samples[place]
    row = {
        "prompt_id": sample.prompt_id,
        "prompt": sample.info["prompt"],
        "response": sample.info["text"],
        "reward": sample.reward,
        "status": sample.status.value,
        "advantage": round(float(batch.advantages[place][0]), 4) if len(batch.advantages[place]) else 0.0,
    }
    if sample.rewards:
        row["rewards"] = {name: round(value, 6) for name, value in sample.rewards.items()}
    if turns := sample.info.get("turns"):
        row["finish_reason"] = sample.finish_reason
        row["turns"] = [turn | {"text": str(turn.get("text", ""))[:MAX_TURN_CHARACTERS]} for turn in turns]
        if bool((batch.advantages[place] != batch.advantages[place][0]).any()):
            for turn in row["turns"]:
                if turn["by"] == "model":
                    turn["advantage"] = round(float(batch.advantages[place][turn["start"]]), 4)
    if sample.images:
        row["images"] = [{"file": names[id(image)], "place": image.start, "tokens": list(image.grid)} for image in sample.images]
    row["worst"] = _worst(sample, update, place, decode)
    row["tokens"] = _tokens(sample, update, place, decode)
    return row


def _tokens(sample: Sample, update: StepResult, place: int, decode: Callable[[list[int]], str]) -> list[list[Any]]:
    """[text, logprob of the engine, of the trainer] of the first response tokens; [text] of those that are not the model's."""
    texts: dict[int, str] = {}
    found: list[list[Any]] = []
    ids, own = sample.response_tokens[:MAX_TOKENS].tolist(), sample.loss_mask.tolist()
    engine, trainer = sample.rollout_logprobs.tolist(), update.old_logprobs[place].tolist()
    for position, token in enumerate(ids):
        text = texts[token] if token in texts else texts.setdefault(token, decode([token]))
        numbers = [round(engine[position], 4), round(trainer[position], 4)] if own[position] else []
        found.append([text, *numbers])
    return found


def _worst(sample: Sample, update: StepResult, place: int, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The model's tokens whose logprobs differ most between engine and trainer; `position` counts response tokens."""
    engine, trainer = sample.rollout_logprobs.cpu(), update.old_logprobs[place].cpu()
    apart = (engine - trainer).abs().where(sample.loss_mask.cpu(), 0.0)
    found = []
    for position in apart.argsort(descending=True)[:WORST].tolist():
        if apart[position] > 0:
            numbers = {"engine": round(float(engine[position]), 4), "trainer": round(float(trainer[position]), 4)}
            token = int(sample.response_tokens[position])
            found.append({"position": position, "id": token, "token": decode([token]), **numbers})
    return found
