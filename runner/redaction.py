"""Secrets stay out of everything that a run writes down, and a resumed run has them all the same. Torch-free.

${oc.env:KEY}               written down as it was typed; a resumed run reads the environment again
http://user:word@host       the password becomes <redacted ID>; `restored` finds it under ID in a file that only this user reads
rollout.server_args.api_key=word   likewise: the key says that its value is a secret
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner.errors import UserError

REDACTED = "<redacted>"
# The last word of a key decides: `hf_token` is a secret, `max_tokens_per_gpu` and `moe_token_dispatcher` are not.
SECRET_KEY = re.compile(r"(^|[_\-.])(token|passw(or)?d|secret|credentials?|api_?key|access_?key|private_?key)$", re.IGNORECASE)
# The secret is the second group: user:password@, a token alone before the @, a token in the query.
_IN_URLS = (
    re.compile(r"(\w[\w+.-]*://[^/\s:@]*:)([^/\s]+)(?=@)"),
    re.compile(r"(https?://)([^/\s:@]+)(?=@)"),
    re.compile(r"([?&](?:token|key|api_?key|access_?key|secret|passw(?:or)?d|sig(?:nature)?)=)([^&\s'\"]+)", re.IGNORECASE),
)
_MARK = re.compile(r"<redacted ([0-9a-f]{32})>")
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)[^}]*\}")
SHORTEST_PART = 6  # characters of an environment variable's value that is looked for inside other texts

_environment: dict[str, str] = {}  # value of a variable that the config reads -> how it was typed
_kept: dict[str, str] = {}  # secret -> its ID, of this process


def remember_environment(raw: DictConfig) -> None:
    """From now on `redacted` knows the values of the environment variables that this config reads."""
    for match in _FROM_ENVIRONMENT.finditer(OmegaConf.to_yaml(raw, resolve=False)):
        if value := os.environ.get(match[1]):
            _environment[value] = f"${{oc.env:{match[1]}}}"


def redacted(value: Any, key: str = "") -> Any:
    """A copy in which secrets are replaced: values under secret-looking keys, parts of URLs, values of the environment."""
    if isinstance(value, dict):
        return {k: redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(v, key) for v in value]
    if isinstance(value, str):
        for secret, typed in _environment.items():
            if value == secret:
                return typed
            if len(secret) >= SHORTEST_PART:
                value = value.replace(secret, typed)
    if value not in (None, "") and SECRET_KEY.search(key) and not str(value).startswith("${oc.env:"):
        return REDACTED
    return _without_url_secrets(value, lambda secret: REDACTED) if isinstance(value, str) else value


def recorded(overrides: list[str]) -> list[str]:
    """Overrides as a run's folder keeps them: each secret a mark with an ID, under which `restored` finds it again."""
    return [_hidden(item, _keep) for item in overrides]


def shown(overrides: list[str]) -> list[str]:
    """Overrides for people: each secret replaced, for good."""
    return [_hidden(item, lambda secret: REDACTED) for item in overrides]


def restored(overrides: list[str]) -> list[str]:
    """The inverse of `recorded`. UserError with what to type where this user has not kept a secret."""
    return [_restored(item) for item in overrides]


def _restored(item: str) -> str:
    return _MARK.sub(lambda match: _found(match[1], item), item)


def _hidden(item: str, replace: Any) -> str:
    name, equals, value = item.partition("=")
    if not equals or _FROM_ENVIRONMENT.fullmatch(value.strip("'\"")):
        return item
    if SECRET_KEY.search(name) and value not in ("", "null"):
        return f"{name}={replace(value)}"
    return f"{name}={_without_url_secrets(value, replace)}"


def _without_url_secrets(text: str, replace: Any) -> str:
    for pattern in _IN_URLS:
        text = pattern.sub(lambda match: match[0] if _is_reference(match[2]) else match[1] + replace(match[2]), text)
    return text


def _is_reference(text: str) -> bool:
    return text.startswith(("${", "<redacted"))


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "runner" / "secrets"


def _keep(secret: str) -> str:
    name = _kept.get(secret) or uuid.uuid4().hex
    try:
        _folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        if secret not in _kept:
            handle = os.open(_folder() / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(secret)
    except (OSError, RuntimeError):
        pass  # no home to write to: a resumed run asks for the secret
    _kept[secret] = name
    return f"<redacted {name}>"


def _found(name: str, item: str) -> str:
    try:
        secret = (_folder() / name).read_text(encoding="utf-8")
    except (OSError, RuntimeError):
        key = item.partition("=")[0].lstrip("+")
        raise UserError(
            "the run was started with a secret that only the user who started it has kept",
            key=key,
            fix=f"give it again: {key}=<value>; '${{oc.env:NAME}}' as a value reads it from the environment",
        ) from None
    _kept[secret] = name
    return secret
