"""CUDA graphs on the host: what is captured has no effect, and a replay repeats operators of torch, not Python."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostCapture(TorchDispatchMode):
    """Operators that a function called, by `replay` on the same tensors. Reading a value on the host raises, and the
    optimizer's step does if there is an `error`."""

    def __init__(self, function: Callable[[], Any], error: Exception | None = None):
        super().__init__()
        self._steps, self._before, self._error = [], [], error
        try:
            with self:
                self.result = function()
        finally:
            with torch.no_grad():
                for tensor, before in reversed(self._before):
                    tensor.copy_(before)
            self._before.clear()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines of it")
        if self._error and "_fused_adam_" in str(function):
            raise self._error
        named = dict(zip((a.name for a in function._schema.arguments), arguments, strict=False)) | options
        written = [named.get(a.name) for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        self._before += [(t, t.detach().clone()) for t in tree_leaves(written) if isinstance(t, Tensor)]
        result = function(*arguments, **options)
        made = new_tensors(function, result)
        if written or made or not function._schema.returns:  # no view
            self._steps.append((function, arguments, options, made))
        return result

    def replay(self):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for function, arguments, options, made in self._steps:
                again = new_tensors(function, function(*arguments, **options))
                for tensor, value in zip(made, again, strict=True):
                    tensor.copy_(value)


def new_tensors(function: Any, result: Any) -> list[Tensor]:
    """Return the tensors of an operator's result that are no arguments or views of them."""
    returns = function._schema.returns
    results = [result] if len(returns) == 1 else result or ()
    new = [value for value, declared in zip(results, returns, strict=True) if declared.alias_info is None]
    return [tensor for tensor in tree_leaves(new) if isinstance(tensor, Tensor)]


class HostGraphs:
    """Stand-in for `CudaGraphs`, which counts. With an `error`, captures of an optimizer's step fail by it."""

    def __init__(self):
        self.warm_ups, self.captures, self.error = 0, [], None

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return function()

    def capture(self, function: Callable[[], Any]) -> HostCapture:
        self.captures.append(HostCapture(function, self.error))
        return self.captures[-1]


def eager_step(
    network: nn.Module, optimizer, clip=None, autocast=None, scaler=None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a step as users write it."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
            loss = F.l1_loss(network(x), target)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step
