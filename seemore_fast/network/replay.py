"""Recordings of calls, repeated without their Python: kernels of Triton and operators of torch.

A recording notes every kernel that a function launches, every operator of torch that computes something, and which
memory they read and write, from when to when. A repetition allocates and frees the same memory and starts the same
kernels with new pointers, on the stream that is current then. Unlike a CUDA graph it holds no memory of the device in
between. What was there before the recording, weights, is constant.
"""

import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..ops.operator import IMPLEMENTATIONS

VECTOR = 16  # bytes, to which kernels were compiled to find pointers aligned
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = {"_unsafe_view", "is_same_size", "promote_types", "result_type"}


@functools.cache
def name_of(function: torch._ops.OpOverload) -> str:
    return function._schema.name.removeprefix("aten::")


@functools.cache
def computes(function: torch._ops.OpOverload) -> bool:
    """Return whether an operator does more than allocate, return views or answer questions without the device."""
    returned = [result.alias_info for result in function._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not is_view and name_of(function) not in FREE | ALLOCATIONS


class InsideOperators(TorchDispatchMode):
    """Dispatch mode that passes all operators of torch to `see`, including those inside of this package's."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        with self:
            if function.namespace == "seemore_fast":
                return IMPLEMENTATIONS[function._schema.name](*arguments, **options)
            result = function.decompose(*arguments, **options)  # inference mode leaves whole what is made of others
        return self.see(function, arguments, options) if result is NotImplemented else result

    def see(self, function: torch._ops.OpOverload, arguments: tuple, options: dict) -> Any:
        """Run an operator and return its result."""
        raise NotImplementedError


class Memory:
    """Memory that is allocated before step `first`, unless it is given or a result of an operator, and freed before
    step `last`."""

    def __init__(self, nbytes: int = 0, first: int | None = None):
        self.nbytes, self.first, self.last = nbytes, first, None


class Place(NamedTuple):
    """Place of a tensor: the number of its memory, and `offset` bytes from its beginning."""

    memory: int
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


class Bases:
    """Memories of a repetition: by number, the tensor that owns each, its offset there, and its address."""

    def __init__(self, count: int):
        self.tensors: list[Tensor | None] = [None] * count
        self.offsets, self.addresses = [0] * count, [0] * count

    def put(self, memory: int, tensor: Tensor, offset: int = 0):
        """Use the storage of a tensor, in which recorded offsets begin at byte `offset`."""
        self.tensors[memory], self.offsets[memory] = tensor, offset
        self.addresses[memory] = tensor.data_ptr() - byte_offset(tensor) + offset

    def tensor(self, place: Place) -> Tensor:
        owner = self.tensors[place.memory]
        assert owner is not None  # a step reads only what is allocated then
        storage = owner.untyped_storage()
        offset = (self.offsets[place.memory] + place.offset) // place.dtype.itemsize
        return torch.empty(0, dtype=place.dtype, device=storage.device).set_(
            storage, offset, place.shape, place.strides
        )


class Operator:
    """Step: a function of tensors, and the memories of its results."""

    def __init__(self, function: Callable, arguments: Any, options: Any, results: list[int | None]):
        self._function, self._results = function, results
        self._leaves, self._structure = tree_flatten((arguments, options), is_leaf=is_place)
        self._places = [(position, leaf) for position, leaf in enumerate(self._leaves) if is_place(leaf)]

    def run(self, bases: Bases, now: Any):
        leaves = self._leaves.copy()
        for position, place in self._places:
            leaves[position] = bases.tensor(place)
        arguments, options = tree_unflatten(leaves, self._structure)
        results = self._function(*arguments, **options)
        for memory, tensor in zip(self._results, tensors_of(results), strict=True) if self._results else ():
            if memory is not None:
                bases.put(memory, tensor)


class Recording(InsideOperators):
    """Recording, as steps, of a block of code; each repetition gets new `given` tensors."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self.steps, self.memories = [], []
        self._live: dict[int, int] = {}  # the number of a memory by its storage
        for tensor in given:
            self._enter(tensor, Memory())

    def run(self, function: Callable, *given: Tensor) -> Any:
        """Record function(*given) and return its results."""
        with self, launching().observed(self._launch):
            return function(*given)

    def see(self, function: torch._ops.OpOverload, arguments: tuple, options: dict) -> Any:
        result = function(*arguments, **options)
        if not computes(function):
            for tensor in tensors_of(result) if name_of(function) in ALLOCATIONS else ():
                self._enter(tensor, Memory(tensor.untyped_storage().nbytes(), len(self.steps)))
            return result
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(result) if leaf is not None):
            raise RuntimeError(f"{function} answers what is on the device: that cannot be recorded")
        arguments, options = tree_map(self._argument, (arguments, options))
        results = [
            None if self._number(tensor) is not None else self._enter(tensor, Memory()) for tensor in tensors_of(result)
        ]
        self.steps.append(Operator(function, arguments, options, results))
        return result

    def _launch(self, launch: Any):
        with _disable_current_modes():  # the interpreter uses operators of torch
            compiled = launch.start()
        if compiled is None:  # interpreted
            arguments = tree_map(self._argument, launch.arguments)
            self.steps.append(Operator(launch.kernel[(launch.programs,)], (), arguments | launch.options, []))
        else:
            self.steps.append(launching().Start(launch, compiled, self._argument))

    def _argument(self, value: Any) -> Any:
        return self.place_of(value) if isinstance(value, Tensor) else value

    def place_of(self, tensor: Tensor) -> Place | Tensor:
        """Return the place of a tensor, or the tensor itself if it is constant."""
        memory = self._number(tensor)
        if memory is None:
            return tensor
        return Place(memory, byte_offset(tensor), tensor.dtype, tensor.shape, tensor.stride())

    def _number(self, tensor: Tensor) -> int | None:
        return self._live.get(tensor.untyped_storage()._cdata)

    def _enter(self, tensor: Tensor, memory: Memory) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() % VECTOR:
            raise RuntimeError(f"memory begins at {storage.data_ptr():#x}, expected a multiple of {VECTOR} bytes")
        self.memories.append(memory)
        self._live[storage._cdata] = len(self.memories) - 1
        weakref.finalize(storage, self._leave, storage._cdata)
        return len(self.memories) - 1

    def _leave(self, storage: int):
        self.memories[self._live.pop(storage)].last = len(self.steps)


class Recorded:
    """Recorded call of a function, repeated for tensors of the same sizes, dtypes, strides and device.

    The function returns a tensor or a sequence of tensors, all of which it allocates.
    """

    def __init__(self, function: Callable, *given: Tensor):
        if len({tensor.untyped_storage()._cdata for tensor in given}) < len(given):
            raise RuntimeError("two of the given tensors share their memory")
        recording = Recording(*given)
        results = recording.run(function, *given)
        self._function, self._offsets = function, [byte_offset(tensor) for tensor in given]
        self._strides, self._count = [tensor.stride() for tensor in given], len(recording.memories)
        self._is_single = isinstance(results, Tensor)
        self._results: list[Place] = []
        for place in map(recording.place_of, tensors_of(results)):
            if not isinstance(place, Place) or place.memory < len(given):
                raise RuntimeError("the result was not allocated by the function")
            self._results.append(place)
        self._steps = [(step, [], []) for step in recording.steps]  # with what is allocated before and freed behind it
        kept = {place.memory for place in self._results}
        for number, memory in enumerate(recording.memories):
            last = len(self._steps) if memory.last is None or number in kept else memory.last
            if memory.first is not None and memory.first < last:
                self._steps[memory.first][1].append((number, memory.nbytes))
            if 0 < last < len(self._steps):
                self._steps[last - 1][2].append(number)

    def __call__(self, *given: Tensor) -> Any:
        if not self._fits(given):
            return self._function(*given)
        bases, device = Bases(self._count), given[0].device
        tensors, addresses = bases.tensors, bases.addresses
        for number, tensor in enumerate(given):
            bases.put(number, tensor, byte_offset(tensor) - self._offsets[number])
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            now = launching().now()
            for step, allocated, freed in self._steps:
                for memory, nbytes in allocated:
                    tensors[memory] = room = torch.empty(nbytes, dtype=torch.uint8, device=device)
                    addresses[memory] = room.data_ptr()
                step.run(bases, now)
                for memory in freed:
                    tensors[memory] = None
        results = [bases.tensor(place) for place in self._results]
        return results[0] if self._is_single else results

    def _fits(self, given: tuple[Tensor, ...]) -> bool:
        strides = [tensor.stride() for tensor in given]
        if strides != self._strides or any(map(is_unaligned, given)):
            return False
        return len(given) == 1 or len({tensor.untyped_storage()._cdata for tensor in given}) == len(given)


def is_place(leaf: Any) -> bool:
    return isinstance(leaf, Place)


@functools.cache
def launching() -> Any:
    """Return the module that launches Triton's kernels, imported late: Triton may be missing."""
    return importlib.import_module("seemore_fast.kernels.launch")


def is_unaligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % VECTOR != 0


def byte_offset(tensor: Tensor) -> int:
    """Return how many bytes of its storage lie before a tensor."""
    return int(tensor.storage_offset()) * tensor.element_size()


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
