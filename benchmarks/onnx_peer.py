"""ONNX Runtime as a peer, where `onnxruntime`, `onnx` and `onnxscript` are installed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def missing() -> list[str]:
    """Packages that it needs and that are not installed."""
    return [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]


@torch.no_grad()
def onnx_runtime(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """``network``, exported for any batch of the example's shape. It runs on PyTorch's number of threads."""
    file = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # By tracing: torch.export does not take the padding of EnCodec, whose amount is a tensor.
        names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
        torch.onnx.export(network, (example,), file, dynamo=False, opset_version=17, **names)

    @functools.cache
    def session(threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # Its threads would otherwise go on spinning, on the core that the next variant needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session(torch.get_num_threads()).run(None, {"x": x.numpy()})[0])

    return run
