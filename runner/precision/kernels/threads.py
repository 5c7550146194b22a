"""Split the rows of a matrix over threads, for kernels that release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

ELEMENTS_PER_THREAD = 1 << 18  # below this, handing rows to another thread costs more than it saves (an estimate)


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool per process: a forked child must not inherit its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="runner-kernels")


def over_rows(function: Callable[[int, int], int], rows: int, columns: int) -> int:
    """Run function(first row, last row + 1) on slices of the rows; returns the largest result.

    At most torch.get_num_threads() threads, the calling one among them.
    """
    threads = max(1, min(torch.get_num_threads(), rows * columns // ELEMENTS_PER_THREAD, rows))
    if threads == 1:
        return function(0, rows)
    bounds = [rows * i // threads for i in range(threads + 1)]
    pool = _pool(torch.get_num_threads(), os.getpid())
    futures = [pool.submit(function, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    first = function(bounds[0], bounds[1])
    return max(first, *(future.result() for future in futures))
