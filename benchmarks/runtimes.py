"""Providers of a network in other CPU runtimes: torch.compile with frozen weights, ONNX Runtime and OpenVINO."""

import functools
import logging
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from seemore_fast.benchmarks import harness


def compiled(model: nn.Module) -> harness.Provider:
    """Return a provider of torch.compile that may fold and pack the weights."""

    def prepare(tensors: harness.InputSet) -> Callable:
        from torch._inductor import config

        call = torch.no_grad()(partial(torch.compile(model), tensors["x"]))
        with config.patch(freezing=True):
            call()
        return call

    return prepare


def exporter(model: nn.Module, x: Tensor) -> Callable[[], bytes]:
    """Return a function that exports the model to ONNX, for images of the size of x, at its first call."""

    @functools.cache
    def export() -> bytes:
        for logger in ("onnxscript", "torch.onnx"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()

    return export


def onnx_runtime(export: Callable[[], bytes], threads: int) -> harness.Provider | str:
    def prepare(tensors: harness.InputSet) -> Callable:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(export(), settings, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: tensors["x"].numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return harness.missing("onnxscript") or harness.missing("onnxruntime") or prepare


@functools.cache
def openvino_core():
    """Return the one Core of this process.

    A Core replaces the stack for signal handlers and restores the previous one when it ends. With two Cores that do
    not end in reverse order, the stack that is restored no longer exists, and the next signal ends the process.
    """
    from openvino import Core

    return Core()


def openvino(export: Callable[[], bytes], threads: int, precision: str) -> harness.Provider | str:
    """Return a provider of OpenVINO in "f32" or "bf16"."""
    absent = harness.missing("onnxscript") or harness.missing("openvino")
    if absent:
        return absent
    core = openvino_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO does not support bf16 on this processor"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}

    def prepare(tensors: harness.InputSet) -> Callable:
        request = core.compile_model(core.read_model(export()), "CPU", hints).create_infer_request()
        feed = {0: tensors["x"].numpy()}
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return prepare
