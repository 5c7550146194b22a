"""Device memory given back for a while: what lies in it moves to the host and comes back bit for bit.

Storages are emptied and not replaced, so every view (a parameter in a flat buffer, a gradient, a shard) stays what it was. A
tensor that is used meanwhile raises: its storage has no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Tensors = Callable[[], Iterable[torch.Tensor]]


class Parking:
    def __init__(self, device: torch.device, keep: Tensors, drop: Tensors) -> None:
        """Both are asked at every `sleep`, since optimizers make their state when they first step. Storages on other kinds of
        devices stay (an offloaded optimizer's). What `drop` alone gives comes back as zeros."""
        self._device, self._keep, self._drop = device, keep, drop
        self._parked: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []

    @property
    def full(self) -> bool:
        return bool(self._parked)

    @torch.no_grad()
    def sleep(self) -> int:
        """Bytes that were given back; 0 when they were already."""
        if self._parked:
            return 0
        kept = self._storages(self._keep())
        dropped = self._storages(self._drop())
        for key, storage in {**dropped, **kept}.items():
            host = None
            if key in kept:
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                host.copy_(_bytes_of(storage))
            self._parked.append((storage, storage.nbytes(), host))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for storage, _, _ in self._parked:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(size for _, size, _ in self._parked)

    @torch.no_grad()
    def wake(self) -> None:
        """Safe to call again."""
        for storage, size, host in self._parked:
            storage.resize_(size)
            content = _bytes_of(storage)
            content.zero_() if host is None else content.copy_(host)
        self._parked = []

    def _storages(self, tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
        """Distinct ones with content, by address."""
        found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device.type)
        return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def tensors_of_optimizer(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """What it steps, and its state."""
    for group in optimizer.param_groups:
        yield from (parameter.detach() for parameter in group["params"])
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
