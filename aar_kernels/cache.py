"""Values derived from weights (packed codebooks, tables), kept until a weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class DerivedCache(Generic[T]):
    """Remembers ``build()`` for a list of tensors while they are the same objects with the same contents.

    A change is seen through the tensor's version counter (optimizer steps, ``copy_``, ``load_state_dict``, any other
    in-place operation) and through its storage (``.to()``, ``tensor.data = other``). Writes that PyTorch itself cannot
    see, through ``tensor.data.copy_()``, NumPy or DLPack, need `clear`. Inference tensors have no version counter, so
    nothing is remembered for them.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[list[_Stamp], T]] = {}

    def get(self, tensors: Sequence[Tensor], build: Callable[[], T]) -> T:
        if any(tensor.is_inference() for tensor in tensors):
            return build()
        key = tuple(map(id, tensors))
        entry = self._entries.get(key)
        if entry is not None and all(stamp.holds() for stamp in entry[0]):
            return entry[1]
        value = build()
        forget = lambda _, entries=self._entries: entries.pop(key, None)  # noqa: E731
        self._entries[key] = ([_Stamp(tensor, forget) for tensor in tensors], value)
        return value

    def clear(self) -> None:
        self._entries.clear()


class _Stamp:
    """The state of one tensor. Holding the storage weakly keeps its address from being given to another one."""

    def __init__(self, tensor: Tensor, on_death: Callable[[object], object]):
        self.tensor = weakref.ref(tensor, on_death)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.state = self._state(tensor)

    def holds(self) -> bool:
        tensor = self.tensor()
        return tensor is not None and self._state(tensor) == self.state

    @staticmethod
    def _state(tensor: Tensor) -> tuple:
        storage = tensor.untyped_storage()._cdata
        return tensor._version, storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
