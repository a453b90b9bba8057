"""Rows of the table of operators (helpers/table.py): the arguments of an operator, and of the tests of its promises."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seemore_fast import backends, ops, reference
from seemore_fast.backends import native

from . import arguments, naive
from .backends import Backend, kernels_of
from .faults import BATCH_AND_PIXELS, FAULTS
from .ops import LAYOUTS, cast


class Call(NamedTuple):
    tensors: dict[str, Tensor]
    options: dict[str, Any]


class Example(NamedTuple):
    """What `OpCase.call` is given. An extra example adds little to the others: few backends take it by default."""

    given: dict[str, Any]
    is_extra: bool = False

    def __str__(self) -> str:
        return " ".join(text_of(*argument) for argument in self.given.items())


def text_of(name: str, value: Any) -> str:
    if name == "shape":
        return "x".join(map(str, value))
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, torch.dtype) or name in ("layout", "activation"):
        return str(value).removeprefix("torch.") if value else f"no {name}"
    return f"{name}={value}".replace(" ", "")


def is_beyond_turns(counts: Iterable[int], positions: Iterable[int]) -> bool:
    """Return whether a combination of axes' values is beyond those that take each value of each axis in turn.

    Of 8 shapes and 3 options 8 combinations are not, of three axes of 2 values 4.
    """
    counts = sorted(counts)
    return len(counts) > 1 and sum(positions) % counts[-2] != 0


def grid(axes: dict[str, Iterable] | None = None, **fixed) -> list[Example]:
    """Return an example of each combination of the axes' values, with the arguments that are fixed.

    An axis such as "shape, recursive" has values of both. Extra are combinations beyond turns, whatever the dtype, and
    float16, which adds little to bfloat16.
    """
    choices = {tuple(names.split(", ")): list(values) for names, values in (axes or {}).items()}
    counts = [len(values) for names, values in choices.items() if names != ("dtype",)]
    examples = []
    for positions in itertools.product(*(range(len(values)) for values in choices.values())):
        given, turn = {}, []
        for (names, values), position in zip(choices.items(), positions, strict=True):
            value = values[position]
            given |= dict(zip(names, value if len(names) > 1 else [value], strict=True))
            turn += [position] if names != ("dtype",) else []
        is_extra = given.get("dtype") == torch.float16 or is_beyond_turns(counts, turn)
        examples.append(Example(given | fixed, is_extra))
    return examples


def extra(examples: list[Example]) -> list[Example]:
    return [example._replace(is_extra=True) for example in examples]


FLOAT32 = grid(dtype=torch.float32)
OF_PYTHON = ("compiles", "opcheck", "double_backward", "autocast")  # promises that no instruction set can break


@dataclass(frozen=True)
class OpCase:
    """An operator, and by the names of promises the examples that test them."""

    name: str
    arguments: Callable[..., dict[str, Any]]
    naive: Callable
    operator: Callable
    reference: Callable
    kernel: str  # whose kernels compute it
    join: Callable[[Callable], Callable] = lambda function: function  # makes one differentiable result of several

    values: list[Example] = field(default_factory=list)
    sizes: list[Example] = field(default_factory=list)  # more, for kernels
    layouts: list[Example] = field(default_factory=list)
    narrow: list[Example] = field(default_factory=list)
    larger: list[Example] = field(default_factory=list)  # than a block, tile or strip: too much for the interpreter
    too_wide: list[Example] = field(default_factory=list)  # for Triton's kernels
    products: list[Example] = field(default_factory=list)  # gradients of weights are sums of several parts
    gradcheck: list[Example] = field(default_factory=grid)
    compiles: list[Example] = field(default_factory=grid)
    other: dict[str, Any] = field(default_factory=lambda: {"shape": (3, 3, 9, 5)})  # sizes of a second call
    opcheck: list[Example] = field(default_factory=lambda: FLOAT32)
    writes: list[Example] = field(default_factory=lambda: FLOAT32)
    offsets: list[Example] = field(default_factory=lambda: grid(dtype=torch.bfloat16))
    deterministic: list[Example] = field(default_factory=lambda: FLOAT32)
    alone: list[Example] = field(default_factory=lambda: FLOAT32)
    double_backward: list[Example] = field(default_factory=lambda: grid(shape=(1, 2, 3, 4), dtype=torch.float32))
    autocast: list[Example] = field(default_factory=lambda: grid(shape=(2, 8, 6, 7), dtype=torch.float32))

    faults: tuple[str, ...] = tuple(FAULTS)
    exempt: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by fault, the tensors that may have it
    free: tuple[tuple[str, int], ...] = tuple(BATCH_AND_PIXELS)  # tensors and dimensions that may be of any size
    bad_options: tuple[tuple[dict[str, Any], str], ...] = ()  # arguments, and what the error says of them
    not_interpreted: tuple[str, ...] = ()  # promises that take the interpreter too long

    @property
    def error_name(self) -> str:
        """The name that errors begin with: for pointwise that of its kernel."""
        return self.kernel if self.name == "pointwise" else self.name

    @property
    def run(self) -> Callable:
        return self.join(self.operator)

    @property
    def baseline(self) -> Callable:
        """The reference, whose error in a dtype is the measure of others."""
        return self.join(self.reference)

    @property
    def formula(self) -> Callable:
        return self.join(self.naive)

    def dtype_of_y(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of `run`: that of the images, but routers' probabilities are float32 at least."""
        return torch.promote_types(dtype, torch.float32) if self.join is joined else dtype

    def call(
        self,
        device: str,
        dtype: torch.dtype = torch.float64,
        layout: str | None = None,
        spread: float = 1,
        offset: float = 0,
        **given,
    ) -> Call:
        """Return tensors and options; the first tensor, the image, is multiplied by `spread` and moved by `offset`."""
        made = self.arguments(device, **given)
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        first = next(iter(tensors))
        tensors[first] = tensors[first] * spread + offset
        tensors = cast(tensors, dtype)
        if layout:
            tensors = {name: LAYOUTS[layout](tensor) for name, tensor in tensors.items()}
        return Call(tensors, {name: value for name, value in made.items() if name not in tensors})

    def call_of(self, backend: Backend, device: str, example: Example, **changes) -> Call:
        """Return the call of an example, in the widest dtype that a backend's kernel has where the example has none."""
        given = example.given | changes
        return self.call(device, **given | {"dtype": given.get("dtype") or backend.widest})


def case(name: str, **more) -> OpCase:
    """Return the row of an operator that has one name everywhere."""
    known = {
        "arguments": getattr(arguments, name),
        "naive": getattr(naive, f"naive_{name}"),
        "operator": getattr(ops, name, None),
        "reference": getattr(reference, name),
        "kernel": name,
    }
    return OpCase(name, **known | more)


def joined(operator: Callable) -> Callable:
    """Return a router with one result for each image: y, if there is one, the experts' probabilities and indices."""

    @functools.wraps(operator)
    def function(*tensors, **options) -> Tensor:
        *images, index, weight = operator(*tensors, **options)
        parts = [*(image.flatten(1).to(weight.dtype) for image in images), 8 * weight, index.to(weight.dtype)]
        return torch.cat(parts, dim=1)

    return function


def each(cases: Iterable[OpCase], promise: str, reference: bool = True, **only):
    """Parametrise `case`, `backend` and `example` over the examples of a promise and the backends that have kernels.

    `only` is handed to kernels_of; without `reference` it is left out, which promises less than kernels do.
    """
    return pytest.mark.parametrize("case, backend, example", list(parameters(cases, promise, reference, **only)))


def takes_products(backend: Backend) -> bool:
    """Return whether a backend takes extra examples by default: kernels for GPUs, and the CPU's of its widest vectors.

    All instruction sets have the same sources; the interpreter takes seconds for each example.
    """
    if backend.family == "cpu":
        return backend == f"cpu {native.instruction_sets()[-1]}"
    return backend.family == "cuda" or (backend == "triton" and not backends.interpreted())


def parameters(cases: Iterable[OpCase], promise: str, reference: bool, interpreted: bool = True, **only) -> Iterator:
    for row in cases:
        interpreted_too = interpreted and promise not in row.not_interpreted
        found = [Backend("reference", row.kernel)] if reference else []
        for backend in [*found, *kernels_of(row.kernel, interpreted_too, **only)]:
            seen = []
            for example in getattr(row, promise):
                resolved = example.given | {"dtype": example.given.get("dtype") or backend.widest}
                if resolved in seen or not backend.serves(example.given):
                    continue
                seen.append(resolved)
                is_extra = example.is_extra or (backend.family == "cpu" and promise in OF_PYTHON)
                identifier = "-".join(filter(None, (row.name, backend, str(example))))
                marks = [pytest.mark.slow] if is_extra and not takes_products(backend) else []
                yield pytest.param(row, backend, example, id=identifier, marks=marks)
