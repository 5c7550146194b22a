"""What is kept of a step's samples for people: `rollouts/step_N.jsonl`, `runner show`, the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runner.data import Batch, Sample
from runner.trainer.protocol import StepResult

KEPT = 8  # samples per step, of as many prompts as there are
WORST = 5  # tokens per sample
MAX_TURN_CHARACTERS = 20_000


def rows(batch: Batch, update: StepResult, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """A JSON-serializable row of some of the samples that a step trained on."""
    places = list(range(len(batch.samples)))
    spread = places[:: max(1, len(places) // KEPT)][:KEPT]
    return [_row(batch, update, place, decode) for place in spread]


def _row(batch: Batch, update: StepResult, place: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
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
    row["worst"] = _worst(sample, update, place, decode)
    return row


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
