"""Parts of a captured training step: CUDA graphs, an optimizer that can be captured, means of gradients."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Capture:
    """Function in a CUDA graph. Nothing is computed before `replay`, and `result` keeps its memory."""

    def __init__(self, function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any):
        self._graph, self._device = torch.cuda.CUDAGraph(), stream.device
        graph = torch.cuda.graph(  # other threads may allocate meanwhile: one of a DataLoader pins batches
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with torch.cuda.stream(stream), graph:  # torch does not leave the stream of a capture that fails
            self.result = function()

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def replay(self):
        with torch.cuda.device(self._device):
            self._graph.replay()


@contextlib.contextmanager
def waiting(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run a block on a stream, which waits for the current one, as that does for the block."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


def on_side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context for the construction of DDP, whose backward can be captured only if made on a side stream."""
    return waiting(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


class CudaGraphs:
    """Warm-ups and captures on one side stream. All graphs share their memory: one of them runs at a time."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._captures: weakref.WeakSet[Capture] = weakref.WeakSet()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Return function(), run on the stream of captures, which loads kernels and allocates an optimizer's state."""
        with waiting(self._stream):
            return function()

    def capture(self, function: Callable[[], Any]) -> Capture:
        pool = next((capture.pool for capture in self._captures), None)  # one without graphs cannot be used again
        with torch.cuda.device(self._stream.device):
            capture = Capture(function, self._stream, pool)
        self._captures.add(capture)
        return capture


class CapturableOptimizer:
    """Optimizer whose learning rates are tensors of the device while it steps.

    Outside of `stepping`, its groups are as its owner and its schedulers set them; `write_rates` copies new rates.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer, self._state = optimizer, None
        self._rates: list[Tensor] = []
        self._written: list[Any] = []

    def constants(self) -> tuple:
        """Return the settings of all groups that a graph would not see change, and where the parameters lie."""
        settings = [
            (name, tuple(value) if isinstance(value, list) else value)
            for group in self._optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        ]
        return *settings, *((p.data_ptr(), p.requires_grad) for p in parameters_of(self._optimizer))

    def has_new_state(self) -> bool:
        """Return whether the optimizer's state is another than at the last call, as after load_state_dict()."""
        if self._state is self._optimizer.state:
            return False
        self._state = self._optimizer.state
        for parameter, state in self._state.items():
            if isinstance(state.get("step"), Tensor):  # on the host, unless fused or capturable
                state["step"] = state["step"].to(parameter.device)
        return True

    def write_rates(self):
        for i, group in enumerate(self._optimizer.param_groups):
            if i == len(self._rates):
                self._rates.append(torch.zeros((), dtype=torch.float32, device=group["params"][0].device))
                self._written.append(None)
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._rates[i].copy_(rate.reshape(()), non_blocking=True)
            elif rate != self._written[i]:
                self._rates[i].fill_(rate)
            self._written[i] = None if isinstance(rate, Tensor) else rate

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Set the groups so that a step can be captured."""
        groups, changed = self._optimizer.param_groups, ("lr", "capturable")
        before = [{name: group[name] for name in changed if name in group} for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def unsupported_reason(network: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> str | None:
    """Return why a training step cannot be captured, or None."""
    name = type(optimizer).__name__
    if not all(group.get("fused") or "capturable" in group for group in optimizer.param_groups):
        return (
            f"optimizer is {name}, whose step cannot be captured: expected one of torch.optim with fused=True (Adam, "
            "AdamW, SGD), or one that has the option capturable"
        )
    if scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"scaler waits for the GPU before each step of {name}: build the optimizer with fused=True"
    if isinstance(network, DistributedDataParallel) and (network.find_unused_parameters or network._comm_hooks):
        return "model is DDP with find_unused_parameters or a communication hook, expected it without them"
    return None


class GradientMean:
    """Means of gradients over the processes of a DDP model, computed between graphs: no collective is captured."""

    def __init__(self, network: DistributedDataParallel):
        self._group, self._names = network.process_group, {}
        self._flat: list[Tensor] = []
        self._views: list[tuple[Tensor, Tensor]] = []  # parameters and their gradients
        trained = [(name, p) for name, p in network.module.named_parameters() if p.requires_grad]
        for dtype in {p.dtype: None for _, p in trained}:
            alike = [(name, p) for name, p in trained if p.dtype == dtype]
            flat = alike[0][1].new_zeros(sum(p.numel() for _, p in alike))
            parts = flat.split([p.numel() for _, p in alike])
            self._flat.append(flat)
            self._views += [  # of the parameters' strides, which fused optimizers expect
                (p, part.as_strided(p.shape, torch.empty_like(p).stride(), part.storage_offset()))
                for (_, p), part in zip(alike, parts, strict=True)
            ]
            self._names |= {p: name for name, p in alike}

    def pack(self):
        """Move the gradients, divided by the number of processes, into one tensor for each dtype."""
        gradients = [p.grad for p, _ in self._views if p.grad is not None]
        if len(gradients) < len(self._views):
            name = next(self._names[p] for p, _ in self._views if p.grad is None)
            raise ValueError(f"{name} has no gradient, expected one for all parameters that require it")
        torch._foreach_copy_([view for _, view in self._views], gradients)
        for flat in self._flat:
            flat.div_(dist.get_world_size(self._group))
        for parameter, view in self._views:
            parameter.grad = view

    def reduce(self):
        for flat in self._flat:
            dist.all_reduce(flat, group=self._group)
