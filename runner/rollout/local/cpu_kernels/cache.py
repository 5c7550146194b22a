"""How the kernels are compiled, and when what was compiled before may be used again.

numba keeps compiled functions on the disk and compiles one anew when the file that holds it has changed. Compiled code holds
what it calls, though, and here that lies in other files too: so a kernel is compiled anew when any file of this folder has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

# Sums may be reordered and products fused, so that loops become vectors; NaN and infinities keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@lru_cache(maxsize=1)
def sources_stamp() -> bytes:
    """Hash of every source file of this folder, by name; taken once, when the first of them is imported."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.digest()


class _FolderCache(FunctionCache):
    """numba's cache of a function, fresh as long as the whole folder is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self.cache_path, self._impl.filename_base, sources_stamp())


def _compiled(function: Callable[..., Any], fastmath: set[str]) -> Any:
    dispatcher: Any = numba.njit(nogil=True, boundscheck=False, error_model="numpy", fastmath=fastmath)(function)
    dispatcher._cache = _FolderCache(function)
    return dispatcher


def compiled(function: Callable[..., Any]) -> Any:
    """A kernel: releases the GIL, checks no bounds."""
    return _compiled(function, _FAST)


def compiled_without_nan(function: Callable[..., Any]) -> Any:
    """The same for code that no NaN reaches."""
    return _compiled(function, _FAST | {"nnan"})
