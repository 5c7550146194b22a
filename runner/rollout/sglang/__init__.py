"""A pool of SGLang servers; `SglangPool` is imported on first use so that tab completion stays free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.rollout.sglang.pool import SglangPool

__all__ = ["SglangPool"]


def __getattr__(name: str) -> Any:
    if name == "SglangPool":
        from runner.rollout.sglang.pool import SglangPool

        return SglangPool
    raise AttributeError(name)
