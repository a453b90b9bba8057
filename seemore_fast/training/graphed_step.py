"""Training step that is replayed as a CUDA graph: forward, loss, backward, clipping and the optimizer's step."""

import contextlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import TrainingError, first_line
from ..network.graphs import size_of
from .capture import CapturableOptimizer, CudaGraphs, GradientMean, parameters_of, unsupported_reason
from .readback import Readback

WARM_UPS = 3  # eager steps of a size before it is captured
MOST = 4  # graphs: each keeps its launches, all share their memory
MOST_KNOWN = 256  # sizes that are counted


class TrainingStep:
    """Step on a batch, eager or, with `graphs`, captured once for each size and replayed.

    network     the model, or DDP around it. With `graphs` no collective is captured: the means of gradients are
                computed between two graphs, forward and backward, and clipping and the optimizer's step
    gradients   function of the network and a batch: adds up the gradients of all parameters, returns the loss
    graphs      `CudaGraphs`, or None for eager steps only
    report      gets a line if steps of a size stay eager because they cannot be captured

    A size is shapes, dtypes and all else that a graph would not see change: autocast, backend, the optimizer's settings
    but for learning rates, the model's mode, which parameters are trained and where they lie. The first steps of a
    size are eager.
    """

    def __init__(
        self,
        network: nn.Module,
        gradients: Callable[..., Tensor],
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        clip: float | None = None,
        graphs: CudaGraphs | Any = None,
        report: Callable[[str], None] = warnings.warn,
    ):
        self.network, self.optimizer, self.scaler, self.clip = network, optimizer, scaler, clip
        self._gradients, self._graphs, self._report, self._mean = gradients, graphs, report, None
        if graphs is not None and isinstance(network, DistributedDataParallel):
            self.network, self._mean = network.module, GradientMean(network)
        self._capturable = CapturableOptimizer(optimizer)
        self._known = OrderedDict()  # size: number of eager steps, graph, or why it has none; the latest last
        self._latest = None

    def __call__(self, *batch: Tensor) -> Tensor:
        if self._graphs is None:
            return self._eager(*batch)
        if self._capturable.has_new_state():
            self._known.clear()
        self._capturable.write_rates()
        size = (*map(size_of, batch), self.network.training, self._capturable.constants())
        known = self._known.pop(size, 0)
        if known == WARM_UPS:
            known = self._try(batch)
        if isinstance(known, Graph):
            if known is not self._latest:
                known.show_gradients()
            loss = known(*batch)
        else:
            with self._capturable.stepping():
                loss = self._graphs.warm_up(lambda: self._eager(*batch))
            known = known if isinstance(known, str) else known + 1
        # Neither a replay nor torch's fused optimizers note what they write to, for keepers of converted weights.
        torch.autograd.graph.increment_version(parameters_of(self.optimizer))
        self._latest = self._known[size] = known
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return loss

    def __len__(self) -> int:
        """Return the number of graphs."""
        return sum(isinstance(known, Graph) for known in self._known.values())

    def _eager(self, *batch: Tensor) -> Tensor:
        loss = self.forward_backward(*batch)
        if self._mean is not None:
            self._mean.reduce()
        self._update()
        return loss

    def forward_backward(self, *batch: Tensor) -> Tensor:
        """Compute the gradients of a batch; return its loss."""
        self.optimizer.zero_grad()
        loss = self._gradients(self.network, *batch)
        if self._mean is not None:
            self._mean.pack()
        return loss

    def _update(self):
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters_of(self.optimizer), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _try(self, batch: tuple[Tensor, ...]) -> "Graph | str":
        """Return a graph for batches of this size, or why there is none, which is reported."""
        while len(self) >= MOST:
            del self._known[next(size for size, known in self._known.items() if isinstance(known, Graph))]
        try:
            with self._capturable.stepping():
                return self._capture(batch)
        except RuntimeError as error:  # an error of the model itself is raised by the eager step that follows
            if self.scaler.is_enabled():  # the capture may have ended between unscale_ and update
                self.scaler._per_optimizer_states.clear()
            shapes = " and ".join(str(tuple(x.shape)) for x in batch)
            reason = first_line(error.__context__ or error)  # the context is what ended the capture
            self._report(f"no CUDA graph for batches of shape {shapes}, their steps run eagerly: {reason}")
            return reason

    def _capture(self, batch: tuple[Tensor, ...]) -> "Graph":
        parameters = parameters_of(self.optimizer)
        inputs = [torch.empty(x.shape, dtype=x.dtype, device=parameters[0].device) for x in batch]
        if self._mean is None:
            first = self._graphs.capture(lambda: self._eager(*inputs))
            phases = [first.replay]
        else:
            first = self._graphs.capture(lambda: self.forward_backward(*inputs))
            phases = [first.replay, self._mean.reduce, self._graphs.capture(self._update).replay]
        return Graph(inputs, first, phases, parameters)


class Graph:
    """Captured step of a size, its inputs and its gradients."""

    def __init__(self, inputs: list[Tensor], first: Any, phases: list[Callable[[], Any]], parameters: list[Tensor]):
        self._inputs, self._first, self._phases, self._parameters = inputs, first, phases, parameters
        self._gradients = [parameter.grad for parameter in parameters]

    def show_gradients(self):
        """Make the gradients of the parameters those of this graph, as after an eager step."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, *batch: Tensor) -> Tensor:
        for buffer, x in zip(self._inputs, batch, strict=True):
            buffer.copy_(x, non_blocking=True)
        for run in self._phases:
            run()
        return self._first.result.clone()


class GraphedStep:
    """Function of LR and HR that takes a training step and returns its loss; made by `graphed_step`."""

    def __init__(self, step: TrainingStep):
        self._step, self._losses, self._count = step, Readback(), 0

    def __call__(self, lr: Tensor, hr: Tensor) -> Tensor:
        loss = self._step(lr, hr)
        self._count += 1
        self._losses.put(self._count, loss)
        while self._losses.is_ready():
            count, value = self._losses.pop()
            if not math.isfinite(value):
                raise TrainingError(f"the loss of step {count} is {value.item()}, found after step {self._count}")
        return loss


def graphed_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    *,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> GraphedStep:
    """Return a function step(lr, hr) -> loss that takes a whole training step, on a GPU as a CUDA graph.

        step = graphed_step(model, torch.nn.functional.l1_loss, optimizer, autocast=torch.bfloat16)
        for lr, hr in batches:
            loss = step(lr, hr)  # on the device: loss.item() waits for it
            scheduler.step()

    loss        function of the network's output and HR
    optimizer   of torch.optim with fused=True (Adam, AdamW, SGD) or with the option capturable, which is set
    clip        largest norm of all gradients together
    autocast    dtype of autocast in forward and loss
    scaler      for float16; with an optimizer of fused=True

    The first steps are eager and load kernels; then a step is captured for each size of batch, and replayed. What
    cannot be captured runs eagerly, and a warning says why. Learning rates may change at every step, and other
    settings of the optimizer make a new graph. A replay calls no Python: hooks and print() run at the capture only, and
    modules must stay the same. Gradients remain in the parameters until the next step. On a CPU each step is eager.

    DDP is used as it is, without find_unused_parameters and communication hooks; on a GPU construct it on a side
    stream: `with torch.cuda.stream(torch.cuda.Stream()): model = DistributedDataParallel(model)`.

    ValueError for an optimizer that cannot be captured, or a model on several devices. TrainingError, some steps
    later, for a loss that is NaN or infinite.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    devices = {parameter.device for parameter in (*model.parameters(), *parameters_of(optimizer))}
    if len(devices) != 1:
        raise ValueError(
            f"model and optimizer are on {', '.join(sorted(map(str, devices))) or 'no device'}, expected one device"
        )
    (device,) = devices
    graphs = graphs_for(device)
    if graphs is not None and (reason := unsupported_reason(model, optimizer, scaler)):
        raise ValueError(reason)

    def gradients(network: nn.Module, lr: Tensor, hr: Tensor) -> Tensor:
        lr, hr = (images.to(device, non_blocking=True) for images in (lr, hr))
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            value = loss(network(lr), hr)
        scaler.scale(value).backward()
        return value.detach()

    return GraphedStep(TrainingStep(model, gradients, optimizer, scaler, clip, graphs))


def graphs_for(device: torch.device) -> CudaGraphs | None:
    return CudaGraphs(device) if device.type == "cuda" else None
