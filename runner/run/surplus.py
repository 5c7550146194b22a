"""When a rollout has samples enough, and what is still under way is surplus.

Asynchronous rollouts ask for more prompts than a step needs (algorithm.oversample_prompts) and take those whose samples are
complete first; the rest is aborted in the engines. Which prompts these are depends on how fast they were: short answers are
favoured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runner.data import Sample
from runner.tasks.protocol import Prompt


@dataclass
class Surplus:
    """Counts complete groups. `samples`: complete ones by (prompt, sample number), as they come.

    wanted   groups that are enough
    usable   whether a complete group counts; called once for each, and it may grade them
    """

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    wanted: int
    usable: Callable[[Prompt, list[Sample]], bool]
    complete: dict[str, list[Sample]] = field(default_factory=dict)
    counted: int = 0
    _open: dict[str, dict[int, list[Sample]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_id = {prompt.prompt_id: prompt for prompt in self.prompts}

    def add(self, prompt_id: str, index: int, samples: list[Sample]) -> bool:
        """What sample number `index` of a prompt became (a conversation may become several). Whether there is enough now."""
        parts = self._open.setdefault(prompt_id, {})
        parts[index] = samples
        if len(parts) == self.samples_per_prompt:
            group = [sample for _, part in sorted(self._open.pop(prompt_id).items()) for sample in part]
            self.complete[prompt_id] = group
            self.counted += self.usable(self._by_id[prompt_id], group)
        return self.counted >= self.wanted

    @property
    def samples(self) -> list[Sample]:
        """Those of complete groups, in the order of the prompts."""
        return [sample for prompt in self.prompts for sample in self.complete.get(prompt.prompt_id, ())]

    @property
    def aborted(self) -> int:
        """Samples that were asked for and are not among them."""
        return (len(self.prompts) - len(self.complete)) * self.samples_per_prompt
