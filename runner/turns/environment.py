"""The default rollout function: turns between the model and an environment."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from runner.data import Sample, Status
from runner.foreign import in_thread
from runner.tasks.protocol import Prompt
from runner.turns.context import Context, Engine
from runner.turns.failure import Failed
from runner.turns.pictures import text_of
from runner.turns.transcript import Transcript

SHOWN_CHARACTERS = 10_000  # of an observation that only people see


class Environment(Protocol):
    """What `task.rollout.environment` names: made anew for every sample as `Environment(**task.rollout.arguments)`. A static
    method `check_arguments` with the same arguments, where there is one, yields UserErrors before a run begins.

    Methods may be async; others, and the constructor, run in a thread of their own, so that one which hangs costs its sample and
    no other.
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
    environment = await in_thread(context.environment)
    talk = context.start(prompt)
    try:
        before = await context.call(environment.reset, prompt)
        empty = before is None or (isinstance(before, str) and not before)
        if not empty and not talk.observe(before):
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
        if callable(close := getattr(environment, "close", None)):
            await context.call(close)


def _answer(answer: object) -> tuple[Any, bool, dict[str, Any]]:
    if not isinstance(answer, tuple) or len(answer) != 3:
        kind = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise Failed("rubbish", f"the environment's step returned {kind}, not (observation, done, info)")
    observation, done, info = answer
    if not isinstance(done, bool | np.bool_) or not isinstance(info, dict):
        kinds = f"done is a {type(done).__name__}, info a {type(info).__name__}"
        raise Failed("rubbish", f"the environment's step returned something else than (observation, done, info): {kinds}")
    return observation, bool(done), info


def _reward(talk: Transcript, info: dict[str, Any]) -> None:
    """Rewards of a turn into the transcript, the rest into its notes."""
    rewards, penalties = _named(info, "rewards"), _named(info, "penalties")
    if "reward" in info:
        rewards["environment"] = info["reward"]
    for name, value in rewards.items():
        talk.reward(value, name)
    for name, value in penalties.items():
        talk.penalty(value, name)
    shown = {str(key): value for key, value in info.items() if key not in ("reward", "rewards", "penalties")}
    talk.note(**shown, **({"rewards": rewards | penalties} if rewards or penalties else {}))


def _named(info: dict[str, Any], key: str) -> dict[str, Any]:
    found = info.get(key)
    if found is not None and not isinstance(found, dict):
        raise Failed("rubbish", f"info[{key!r}] of the environment is a {type(found).__name__}, not numbers by name")
    return {str(name): value for name, value in (found or {}).items()}
