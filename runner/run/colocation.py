"""Trainer and engines that share GPUs: whoever is asked next has the memory, the other one sleeps.

Both are wrapped, so that the loop, the warm start, evaluations and checkpoints need not know. In a weight sync the trainer hands
over in the middle: it is awake while its export is written to the host, and asleep when the engines begin to load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, Literal, cast

from runner.data import WeightStream
from runner.rollout.protocol import RolloutPool
from runner.trainer.protocol import Trainer


class Use(Enum):
    """What a member of a protocol needs of the GPUs."""

    memory = "its side is awake, the other one sleeps"
    load = "the trainer is awake until its stream ends; loading wakes the engines"
    nothing = "either side may be awake"


# Every member of the protocols: one that is missing here cannot be reached (a test compares).
TRAINER = {
    "version": Use.nothing,
    "logprobs": Use.memory,
    "reference_logprobs": Use.memory,
    "step": Use.memory,
    "sft_step": Use.memory,
    "reset_optimizer": Use.memory,
    "export": Use.memory,
    "save": Use.memory,
    "begin_save": Use.memory,
    "load": Use.memory,
    "sleep": Use.nothing,
    "wake": Use.nothing,
    "close": Use.nothing,
}
POOL = {
    "version": Use.nothing,
    "generate": Use.memory,
    "update_weights": Use.load,
    "score": Use.memory,
    "describe": Use.nothing,
    "metrics": Use.nothing,
    "notices": Use.nothing,
    "state": Use.nothing,
    "load_state": Use.nothing,
    "decide": Use.nothing,
    "apply": Use.nothing,
    "close": Use.nothing,
}


class TimeShared:
    """`trainer` and `pool` behave as those that are given, which must not be used beside them any more."""

    def __init__(self, trainer: Trainer, pool: Any) -> None:
        """`pool` has `sleep` and `wake` beside the protocol, and is awake; so is the trainer, unless it sleeps already."""
        self._trainer, self._pool = trainer, pool
        self._awake: Literal["trainer", "pool"] = "pool"
        trainer.sleep()
        self.trainer = self._shared_trainer()
        self.pool = cast(RolloutPool, _Shared(pool, POOL, self._to_pool, self._handing_over))

    def _shared_trainer(self) -> Trainer:
        return cast(Trainer, _Shared(self._trainer, TRAINER, self._to_trainer, self._handing_over))

    def replace_trainer(self, trainer: Trainer) -> Trainer:
        """In place of one that was lost; awake, so the engines must sleep before it is built (`make_room`)."""
        self._trainer, self._awake = trainer, "trainer"
        self.trainer = self._shared_trainer()
        return self.trainer

    def make_room(self) -> None:
        self._pool.sleep()

    def _to_trainer(self) -> None:
        if self._awake != "trainer":
            self._pool.sleep()
            self._trainer.wake()
            self._awake = "trainer"

    def _to_pool(self) -> None:
        if self._awake != "pool":
            self._trainer.sleep()
            self._pool.wake()
            self._awake = "pool"

    def _handing_over(self, stream: WeightStream) -> WeightStream:
        """The stream, at whose end the trainer sleeps; loading it wakes the engines."""
        yield from stream
        self._trainer.sleep()
        self._awake = "pool"


class _Shared:
    """`part`, of which `uses` says what each member needs."""

    def __init__(
        self,
        part: Any,
        uses: Mapping[str, Use],
        hand_over: Callable[[], None],
        handing_over: Callable[[WeightStream], WeightStream],
    ) -> None:
        self.__dict__.update(_part=part, _uses=uses, _hand_over=hand_over, _handing_over=handing_over)

    def __getattr__(self, name: str) -> Any:
        use = self._use(name)
        member = getattr(self._part, name)
        if use is Use.nothing:
            return member
        return partial(self._with_memory if use is Use.memory else self._loading, member)

    def __setattr__(self, name: str, value: Any) -> None:
        self._use(name)
        setattr(self._part, name, value)

    def _use(self, name: str) -> Use:
        if name not in self._uses:
            raise AttributeError(f"nobody said what {name} of {type(self._part).__name__} needs of shared GPUs (colocation.py)")
        found: Use = self._uses[name]
        return found

    def _with_memory(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._hand_over()
        return method(*args, **kwargs)

    def _loading(self, method: Callable[..., Any], version: int, stream: WeightStream) -> Any:
        return method(version, self._handing_over(stream))
