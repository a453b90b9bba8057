"""LRU cache of CUDA graphs, or recordings, of a function of tensors, keyed by size."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..errors import first_line

MOST = 4  # graphs, each of which keeps the memory that a call takes
MOST_SEEN = 1024  # sizes of which it is known that they came once, or cannot be captured

EAGER = "came once"


class Captured:
    """Call in a CUDA graph, whose input and output keep their memory."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor):
        self._x = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()
        with torch.cuda.device(x.device):
            function(self._x.copy_(x))  # loads kernels, which a capture must not
            # Other threads may allocate meanwhile: on another GPU, each image has one.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._y = function(self._x)
            self._done.record()

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device(x.device):
            self._done.wait()  # the last call's result may still be on its way from here, on another stream
            self._x.copy_(x)
            self._graph.replay()
            y = self._y.clone()
            self._done.record()
            self._x.record_stream(torch.cuda.current_stream())  # which may not be the one it was made on
        return y


class Graphs:
    """Function of an image, called as it is at the first image of a size and captured at the second.

    So images of many sizes, each of which comes once, pay for no graphs. A size is shape, dtype, device, and all that
    chooses other kernels: autocast, backend, TF32; of more tensors beside the image strides, too. The graph that was
    not used for longest makes room for a new one. Where capturing fails, for want of memory say, calls go on without,
    and a warning says why.
    """

    def __init__(
        self,
        function: Callable,
        most: int = MOST,
        capture: Callable = Captured,
        what: str = "CUDA graph",
    ):
        self._function, self._most, self._capture, self._what = function, most, capture, what
        self._known = OrderedDict()  # size: what is called, or EAGER, or why it cannot be captured; the latest last
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, *more: Tensor) -> Any:
        # Buffers made in inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            size = size_of(x), tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in more)
            call = self._known.pop(size, None)
            if call == EAGER:
                call = self._try(x, *more)
            self._known[size] = EAGER if call is None else call
            while len(self._known) > MOST_SEEN:
                self._known.popitem(last=False)
            return (self._function if isinstance(call, str | None) else call)(x, *more)

    def __len__(self) -> int:
        """Return the number of graphs."""
        return sum(not isinstance(call, str) for call in self._known.values())

    def _try(self, x: Tensor, *more: Tensor) -> Callable | str:
        if len(self) >= self._most:  # before, so that its memory is there for the new one
            del self._known[next(size for size, call in self._known.items() if not isinstance(call, str))]
        try:
            return self._capture(self._function, x, *more)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = f"no {self._what} for x of shape {tuple(x.shape)}, calls go on without: {first_line(error)}"
            warnings.warn(reason, stacklevel=3)
            return reason


def size_of(x: Tensor) -> tuple:
    """Return everything that decides which kernels a call launches."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # these two follow all of torch's switches of TF32; reading an old one raises once a new one is set
    convolution = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    precisions = convolution.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return tuple(x.shape), x.dtype, x.device, autocast, backends.current_backend(), *precisions
