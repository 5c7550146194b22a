"""The default rollout function: turns between the model and an environment."""

from __future__ import annotations

import math
from typing import Any, Protocol

from runner.data import Sample, Status
from runner.tasks.protocol import Prompt
from runner.turns.context import Context, Engine
from runner.turns.failure import Failed
from runner.turns.pictures import text_of
from runner.turns.transcript import Transcript

SHOWN_CHARACTERS = 10_000  # of an observation that only people see


class Environment(Protocol):
    """What `task.rollout.environment` names: made anew for every sample as `Environment(**task.rollout.arguments)`. A static
    method `check_arguments` with the same arguments, where there is one, yields UserErrors before a run begins.

    Methods may be async; others run in a thread of their own, so that one which hangs costs its sample and no other.
    """

    def reset(self, prompt: Prompt) -> Any:
        """An observation that follows the prompt before the model's first turn; None or "" where the prompt says everything."""
        ...

    def step(self, response: str) -> tuple[Any, bool, dict[str, Any]]:
        """(observation, done, info) after a turn of the model. The observation of the last turn is not shown to it.

        An observation is a text, an image (of PIL, or a uint8 array [height, width, 3]), or a list of both, in their order.

        info["reward"] is a number, info["rewards"] a dict of such by name: they are added up over the turns and logged as
        reward/<name>; without any the task's own reward is asked. info["penalties"], a dict by name, is added to the task's.
        Everything else in `info` is shown beside the turn.
        """
        ...


async def drive(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """One sample: turns until the environment says that it is done, `max_turns` are over, or there is no more room."""
    environment = context.environment()
    talk = context.start(prompt)
    try:
        before = await context.call(environment.reset, prompt)
        if before is not None and before != "" and not talk.observe(before):
            raise Failed("context", "what the environment says first leaves the model no room")
        for _ in range(context.max_turns):
            turn = await engine.generate(talk)
            if not turn.finished:
                return talk.sample()
            observation, done, info = _answer(await context.call(environment.step, turn.text))
            _reward(talk, info)
            if done:
                if last := text_of(observation):
                    talk.turns.append({"by": "environment", "text": last[:SHOWN_CHARACTERS], "left_out": True})
                return talk.sample(reason="done")
            if not talk.observe(observation):
                return talk.sample()
        return talk.sample(Status.truncated, "max_turns")
    finally:
        if close := getattr(environment, "close", None):
            await context.call(close)


def _answer(answer: object) -> tuple[Any, bool, dict[str, Any]]:
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise Failed("rubbish", f"the environment's step returned {type(answer).__name__}, not (observation, done, info)")
    observation, done, info = answer
    if not isinstance(done, bool) or not isinstance(info, dict):
        kinds = f"done is a {type(done).__name__}, info a {type(info).__name__}"
        raise Failed("rubbish", f"the environment's step returned something else than (observation, done, info): {kinds}")
    return observation, done, info


def _reward(talk: Transcript, info: dict[str, Any]) -> None:
    """Rewards of a turn into the transcript, the rest into its notes."""
    parts = dict(info.get("rewards") or {})
    if "reward" in info:
        parts["environment"] = info["reward"]
    penalties = dict(info.get("penalties") or {})
    for name, value in [*parts.items(), *penalties.items()]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise Failed("rubbish", f"the environment's reward {name} is a {type(value).__name__}") from None
        if not math.isfinite(number):
            raise Failed("rubbish", f"the environment's reward {name} is {number}")
        if name in parts:
            talk.reward(number, str(name))
        else:
            talk.penalty(number, str(name))
    shown = {str(key): value for key, value in info.items() if key not in ("reward", "rewards", "penalties")}
    talk.note(**shown, **({"rewards": parts | penalties} if parts or penalties else {}))
