"""Values derived from weights (packed codebooks, tables), kept until a weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class DerivedCache(Generic[T]):
    """Remembers ``build()`` for a list of tensors while they are the same objects with the same contents.

    A change is seen through the tensor's version counter (optimizer steps, ``copy_``, ``load_state_dict``, any other
    in-place operation) and through its address (``.to()``, ``tensor.data = other``). Writes that PyTorch itself cannot
    see, through ``tensor.data.copy_()``, NumPy or DLPack, need `forget` or `clear`. Inference tensors have no version
    counter, so nothing is remembered for them.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Hashable, ...], tuple[list, list, T]] = {}

    def get(self, tensors: Sequence[Tensor], build: Callable[[], T], *options: Hashable) -> T:
        """The value for these tensors and whatever else ``build`` depends on."""
        key = (*options, *map(id, tensors))
        entry = self._entries.get(key)
        if entry is not None and [(t._version, t.data_ptr(), t.stride()) for t in tensors] == entry[0]:
            return entry[2]
        value = build()
        if not any(tensor.is_inference() for tensor in tensors):
            state = [(t._version, t.data_ptr(), t.stride()) for t in tensors]
            # An entry dies with any of its tensors, before another one can get its id; and it keeps their storages, so
            # that no other tensor can get their addresses.
            forget = _Forget(self._entries, key)
            held = [(weakref.ref(t, forget), t.untyped_storage()) for t in tensors]
            self._entries[key] = (state, held, value)
        return value

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Drop what was made of any of these: for writes that PyTorch cannot see."""
        changed = set(map(id, tensors))
        for key in [key for key in self._entries if changed.intersection(key)]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class _Forget:
    """Drops an entry when one of its tensors dies."""

    def __init__(self, entries: dict, key: tuple):
        self.entries, self.key = entries, key

    def __call__(self, _: weakref.ref) -> None:
        self.entries.pop(self.key, None)
