"""The in-process engine; `LocalPool` is imported on first use so that tab completion stays free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.rollout.local.pool import LocalPool

__all__ = ["LocalPool"]


def __getattr__(name: str) -> Any:
    if name == "LocalPool":
        from runner.rollout.local.pool import LocalPool

        return LocalPool
    raise AttributeError(name)
