"""A pretended limit of memory: torch's allocations are counted, and one too many fails, as on a machine that is full."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryLimit(TorchDispatchMode):
    """Counts the bytes of tensors that are made within, as long as they live.

    Args:
        most: bytes that may live at a time; None = any number.

    Attributes:
        peak: most bytes that lived at a time.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most, self.peak = most, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {id_ for id_, (reference, _) in self._live.items() if not reference.expired()}
        self._live = {id_: self._live[id_] for id_ in known}
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._live:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.held)
        if self.most is not None and self.held > self.most:
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {self.held} of {self.most} bytes")
        return result

    @property
    def held(self) -> int:
        """Bytes that live now."""
        return sum(size for reference, size in self._live.values() if not reference.expired())
