"""Hooks for every device: no key in a log."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    HookRegistry.register("sglang.srt.entrypoints.engine._server_args_for_logging", _without_keys, HookType.AFTER)


def _without_keys(result: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {key: "***" if key in ("api_key", "admin_api_key") and value else value for key, value in result.items()}
