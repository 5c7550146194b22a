"""Rules that several tasks have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from runner.config.schema import Config
from runner.errors import UserError
from runner.models import family_of
from runner.models.family import VisualTower


def seen_by(cfg: Config) -> VisualTower | None:
    """The visual tower that a task's images are shown to; None for a model that cannot see or whose tower a rule refuses."""
    try:
        return family_of(cfg.model).tower(cfg.model)
    except UserError:
        return None


def held_out(cfg: Config) -> Iterator[UserError]:
    """A rule: no more problems are evaluated than are held out."""
    problems: int = cfg.task.eval_problems  # type: ignore[attr-defined]
    if problems < cfg.evaluation.num_prompts:
        yield UserError(
            f"{cfg.evaluation.num_prompts} prompts are evaluated, {problems} are held out",
            key="evaluation.num_prompts",
            fix=f"task.eval_problems={cfg.evaluation.num_prompts}",
        )


def turns_needed(why: str) -> Callable[[Config], Iterator[UserError]]:
    """A rule of a task that an environment must take part in."""

    def has_turns(cfg: Config) -> Iterator[UserError]:
        if cfg.task.rollout._target_ is None:
            yield UserError(why, key="task.rollout._target_", fix="task.rollout._target_=runner.turns.drive")

    return has_turns
