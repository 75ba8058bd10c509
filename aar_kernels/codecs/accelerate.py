"""`accelerate` and `restore`: find quantizers and stacks of other packages in a model, and exchange their classes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import dispatch
from . import (
    dac,
    encodec,
    moshi,
    snac,
    transformers_encodec,
    transformers_higgs,
    transformers_mimi,
    var,
    vector_quantize_pytorch,
)
from .adapter import Adapter, Unsupported, adapted, check_signatures, original_class
from .search import Search

# Full names of classes: a package is never imported, for a model that comes from it has done so.
ADAPTERS: dict[str, type[Adapter]] = {
    **transformers_encodec.ADAPTERS,
    **transformers_higgs.ADAPTERS,
    **transformers_mimi.ADAPTERS,
    **encodec.ADAPTERS,
    **moshi.ADAPTERS,
    **dac.ADAPTERS,
    **snac.ADAPTERS,
    **vector_quantize_pytorch.ADAPTERS,
    **var.ADAPTERS,
}

# What lies within those and searches where the original's forward pass runs, as it does in training.
PARTS: dict[str, type[Search]] = {
    **encodec.PARTS,
    **moshi.PARTS,
    **dac.PARTS,
    **snac.PARTS,
    **vector_quantize_pytorch.PARTS,
}


@dataclass(frozen=True)
class Entry:
    """What became of one quantizer."""

    path: str  # in the model; "" for the model itself
    quantizer: str  # its class
    levels: str = ""  # what it computes
    reason: str = ""  # why it was left alone; "" where it was replaced


@dataclass(frozen=True)
class Report:
    """What `accelerate` replaced, and what it did not and why. Prints as a table."""

    replaced: list[Entry]
    left: list[Entry]
    note: str = ""

    def __str__(self) -> str:
        rows = [(entry.path or "(the model)", entry.quantizer, entry.levels) for entry in self.replaced]
        rows += [(entry.path or "(the model)", entry.quantizer, f"left alone: {entry.reason}") for entry in self.left]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not rows:
            lines = ["no quantizer found"]
        return "\n".join([*lines, self.note] if self.note else lines)


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Let residual quantizers, the stacks of EnCodec, Mimi and DAC, and VAR's attention in ``model`` run fused.

    In place. Encoding and decoding, and ``forward`` in eval mode, keep their signatures and results: codes are the same
    except where float32 rounding decides. Weights stay where they are and are read live: ``load_state_dict``, ``.to()``
    and optimizer steps take effect. What would differ runs the package's own code as before: training and gradients,
    autocast, float16 and bfloat16, and, unless ``backend`` is given, GPUs.

    Calling it again is harmless. A deep copy of the model is accelerated too; a pickled one is of the original classes.
    Under ``torch.compile`` each quantizer is a graph break.

    Args:
        backend: the one backend that may run; see `aar_kernels.use_backend`.

    Returns:
        what was replaced, and what was not and why; ``print`` it.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in (None, *dispatch.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; one of {', '.join(dispatch.BACKENDS)}")
    replaced, left, devices = [], [], set()
    for path, module, adapter in _known(model):
        before, original, name = type(module), original_class(module), _shown(module)
        try:
            if _name(original) not in ADAPTERS:
                raise Unsupported(f"a subclass of {adapter.__name__}, which may mean something else")
            check_signatures(adapter, original)
            module.__class__ = adapted(original, adapter, backend)
            levels = module._check()
        except (Unsupported, AttributeError) as reason:  # an attribute that this version of the package has not
            module.__class__ = before
            left.append(Entry(path, name, reason=str(reason)))
            continue
        replaced.append(Entry(path, name, levels))
        left += [Entry(path, part, reason=f"in training {reason}") for part, reason in _parts(module, backend).items()]
        devices |= {tensor.device.type for tensor in module.buffers()} | {p.device.type for p in module.parameters()}
    known = [entry.path for entry in (*replaced, *left)]
    left += [Entry(path, type(module).__qualname__, reason="unknown") for path, module in _unknown(model, known)]
    reason = dispatch.operators()["msrq_encode"]["native"]
    if reason is None and devices - {"cpu"}:
        reason = f"on {', '.join(sorted(devices - {'cpu'}))} the operators run only if a backend is asked for"
    note = f"The packages' own code runs: {reason}" if replaced and reason and backend is None else ""
    return Report(replaced, left, note)


def restore(model: nn.Module) -> None:
    """Give every quantizer in ``model`` its own class back."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.__class__ = original_class(module)


def patch_mapping(*, backend: str | None = None) -> dict[str, type[nn.Module]]:
    """The same classes for transformers' own way of patching, which builds models from them::

        transformers.monkey_patching.register_patch_mapping(aar_kernels.codecs.patch_mapping())
        model = MimiModel.from_pretrained(...)  # no `accelerate` needed, and `restore` works

    No report tells what was replaced: what the operators lack is found when the module is first called, and runs the
    package's own code. A class whose methods this version of transformers changed is not in the mapping.

    Args:
        backend: as in `accelerate`.

    Returns:
        replacements by patterns of class names: ``register_patch_mapping`` looks for a name anywhere in another.
    """
    mapping = {}
    for name, adapter in ADAPTERS.items():
        module, _, attribute = name.rpartition(".")
        if not name.startswith("transformers."):
            continue
        try:
            original = getattr(importlib.import_module(module), attribute)
            check_signatures(adapter, original)
        except (ImportError, AttributeError, Unsupported):  # a model that this version does not have, or not like this
            continue
        mapping[f"^{attribute}$"] = adapted(original, adapter, backend)
    return mapping


def _parts(quantizer: nn.Module, backend: str | None) -> dict[str, str]:
    """Exchange the parts of a quantizer that search in training. Why some could not be, by their classes."""
    reasons = {}
    for part in quantizer.modules():
        original = original_class(part)
        if (adapter := PARTS.get(_name(original))) is not None:
            try:
                check_signatures(adapter, original)
            except Unsupported as reason:
                reasons[_shown(part)] = str(reason)
            else:
                part.__class__ = adapted(original, adapter, backend)
    return reasons


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Adapter]]]:
    """Quantizers of a class in the table, or of a subclass of one."""
    for path, module in model.named_modules():
        for ancestor in original_class(module).__mro__:
            if _name(ancestor) in ADAPTERS:
                yield path, module, ADAPTERS[_name(ancestor)]
                break


def _unknown(model: nn.Module, known: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """What has the name of a quantizer, and neither holds nor lies in one that is known."""
    found: list[str] = []
    for path, module in model.named_modules():
        name = type(module).__name__.lower()
        related = any(_holds(path, other) or _holds(other, path) for other in known)
        if ("quantiz" in name or name.endswith("vq")) and not related and not any(_holds(f, path) for f in found):
            found.append(path)
            yield path, module


def _holds(path: str, other: str) -> bool:
    return not path or other == path or other.startswith(path + ".")


def _shown(module: nn.Module) -> str:
    cls = original_class(module)
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
