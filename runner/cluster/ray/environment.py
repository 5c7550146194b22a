"""Environment variables that Ray reads when it is first imported, and what is said about its token. Imports no Ray."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from runner.errors import UserError

KEY = "cluster.address"
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USE_UVLOOP": "0",  # async actors fail now and then under it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs of its own keeps its node's CUDA_VISIBLE_DEVICES
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # Ray gives its workers 15: ranks and servers would starve beside whoever else has the node
    # a start of hundreds of processes at once is no failure
    "RAY_worker_register_timeout_seconds": "120",
    "RAY_gcs_server_request_timeout_seconds": "120",
}
LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"
}  # set at all, on Linux: every socket of Ray on 127.0.0.1 instead of [::]
TOKEN_PROBLEM = "the Ray cluster at {address} does not take our token"
TOKEN_FIX = f"{TOKEN_PATH}=<the file that its nodes were started with>, of mode 0600"


def settle(extra: dict[str, str]) -> None:
    """Set what Ray reads; what the user set stays, except `extra`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update(extra)
    if "ray._raylet" in sys.modules:  # it has read them already
        from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without stubs

        Config.initialize("")


def check_token(*, insecure: bool) -> None:
    """Before a cluster is joined: UserError where this process has no token, or has it where others read it. Ray itself would
    end the process, or be silent for 21 seconds."""
    if insecure:
        return
    os.environ[MODE] = "token"
    if os.environ.get(TOKEN):
        return
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    if not path.is_file() or not path.read_text().strip():
        raise UserError(f"there is no token of the Ray cluster: {path} does not exist or is empty", key=KEY, fix=TOKEN_FIX)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"others may read the token in {path}", key=KEY, fix=f"chmod 600 {path}")
    os.environ[TOKEN_PATH] = str(path)
