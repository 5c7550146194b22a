"""What the loop needs of a task: prompts that depend on (seed, step, round) alone, and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from runner.data import Sample
    from runner.models.images import Images


@dataclass(frozen=True)
class Prompt:
    """One problem.

    prompt_id  unique within a split and stable over runs with the same seed
    tokens     [P] ids of the whole prompt, ready for a Request
    answer     the reference answer, in the task's own normal form
    images     what the placeholder tokens among `tokens` stand for, in their order
    originals  uint8 [H, W, 3] each: the same images before they were reduced, where somebody may look closer; () otherwise
    """

    prompt_id: str
    text: str
    tokens: tuple[int, ...]
    answer: str
    info: dict[str, Any] = field(default_factory=dict)
    images: Images = ()
    originals: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        """All samples of a prompt share its pixels: an environment that draws into them gets an error."""
        for pixels in (*self.originals, *(image.pixels for image in self.images)):
            pixels.flags.writeable = False


class Task(Protocol):
    name: str

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        """`count` training problems for this step; `round` > 0 asks for others (dynamic sampling).

        A pure function of (seed, step, count, round), and of where a resumed run began: see WalksThroughData.
        """
        ...

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out problems (fewer when the set is smaller); never among the training problems."""
        ...

    def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
        """The reward of one response. `text` is decoded without special tokens; model text is never run as code."""
        ...


@runtime_checkable
class WalksThroughData(Protocol):
    """A task whose training problems are finite: a resumed run goes on where it was, counted in problems and not in steps."""

    def data_state(self, step: int, count: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps of `count` problems keeps: the place, and of which problems in which order."""
        ...

    def continue_at(self, step: int, state: dict[str, Any] | None) -> str | None:
        """Draw for `step` and the steps after it from the place in `state`; None: `step` steps of equal size were drawn.

        Other problems, or the same ones in another order, begin at their beginning; returns a text that says so, else None.
        """
        ...


@runtime_checkable
class HasWorkedSolutions(Protocol):
    """A task that can teach its format before RL."""

    def worked_solutions(self, count: int, seed: int) -> Sequence[tuple[str | Prompt, str]]:
        """(prompt, solution text) pairs for the supervised warm start; an end token follows the solution. A prompt is its
        text, or a Prompt where images belong to it."""
        ...
