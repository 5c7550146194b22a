"""A rollout of your own: the model answers; a wrong sum gets its last digit as a hint and one more try, which is worth half.

Any async function `rollout(engine, prompt, context)` will do; it runs with every engine, and as many at a time as fit.
"""

from __future__ import annotations

from runner.data import Sample
from runner.tasks.protocol import Prompt
from runner.turns.context import Context, Engine

HINT_REWARD = 0.5


async def rollout(engine: Engine, prompt: Prompt, context: Context) -> Sample:
    """One conversation. Tokens of the hint are part of the sample, with loss_mask 0: nothing is learned from them."""
    talk = context.start(prompt)
    first = await engine.generate(talk, max_tokens=40)
    right = context.task.reward(prompt, first.text, None)
    talk.reward(right, "first")
    if right or not first.finished:
        return talk.sample()
    if talk.observe(f" it ends in {prompt.answer[-1]}:"):  # False where there is no room left: the conversation ends here
        second = await engine.generate(talk, max_tokens=40)
        talk.reward(HINT_REWARD * context.task.reward(prompt, second.text, None), "second")
    return talk.sample()
