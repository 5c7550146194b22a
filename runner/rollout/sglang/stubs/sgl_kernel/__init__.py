"""Stands in for sgl_kernel's CPU build, of which no wheel is published. On the path of SGLang's CPU servers only.

Importable; an operator that nobody wrote here raises when it is called. What plain decoding and speculation call on a CPU
is in operators.py, in plain torch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

if torch.cuda.is_available():
    raise ImportError("runner's stand-in for sgl_kernel is for CPU servers only: install sglang-kernel")

WRITTEN_HERE = ("sgl_kernel.operators", "sgl_kernel.speculative")
ABSENT = ("sgl_kernel.scalar_type",)  # SGLang falls back to its own on ImportError


def _missing(name: str) -> Any:
    def operator(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} needs the CPU build of sgl-kernel")

    operator.__name__ = name.rpartition(".")[2]
    return operator


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.startswith("sgl_kernel.") and fullname not in (*WRITTEN_HERE, *ABSENT):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())

from sgl_kernel.operators import *  # noqa: E402, F403


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(f"sgl_kernel.{name}")
