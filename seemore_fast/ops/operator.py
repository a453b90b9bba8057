"""Declaration of operators: one statement each, from which checks, schema, fakes, gradients and kernel calls follow.

An operator <op> is `seemore_fast::<op>` and, for its gradients, `seemore_fast::<op>_backward`: Python functions that
allocate the results and call the kernel of the selected backend.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..backends import backend_of, lookup_kernel, select_backend
from .allocation import empty_like, stencil
from .autocast import to_autocast_dtype
from .checks import Spec, check_choice, check_shapes, check_tensors

P = ParamSpec("P")
R = TypeVar("R")
Values = dict[str, Any]  # arguments by name, in the order of the schema

LIBRARY = torch.library.Library("seemore_fast", "DEF")
IMPLEMENTATIONS: dict[str, Callable] = {}  # Python functions by the operators' qualified names


def define(name: str, schema: str, implementation: Callable, fake: Callable):
    """Register ``seemore_fast::<name><schema>``: the function, and the one that gives compilers shapes and strides."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    IMPLEMENTATIONS[f"seemore_fast::{name}"] = implementation
    torch.library.register_fake(f"seemore_fast::{name}", fake, lib=LIBRARY)


def refuse_second_derivative(name: str, ctx: Any, *gradients: Tensor):
    """Raise RuntimeError: backward of `name` has no derivative."""
    raise RuntimeError(
        f"{name}: its gradient is not differentiable, expected a single backward; "
        'under seemore_fast.use_backend("reference") torch differentiates any number of times'
    )


class Operator(Generic[P, R]):
    """Operator with kernels, called like its reference `function`, whose signature gives the names and their order.

    shapes      of its tensors by name, as `check_tensors` takes them; the first tensor selects backend and kernel
    options     schema types of the other arguments: "str? activation", "int", "float", "int[]"
    results     function of the values by name that allocates what the kernel writes; users get the first one
    size        number of taps, or of channels that are summed over, of which kernels have a most
    autocast    names of the tensors that autocast casts, or a function of the values that casts them
    one_dtype   whether dtypes may not differ under autocast either, but for those marked "autocast"
    validate    checks of the values beyond shapes and dtypes, given the sizes that the letters stand for
    kept        number of results that only backward reads, right after dy
    outside     functions of dy for the tensors whose gradients need no kernel; backward does not get these

    Kernels take results, then the arguments in order; backward kernels the gradients of images, then of parameters,
    then dy, what was kept and the arguments. Optional tensors without a value have an empty gradient there.
    """

    returns: int | None = None  # number of the dispatcher's results, where it is not y and what is kept
    backward_schema: str | None = None

    def __init__(
        self,
        function: Callable[P, R],
        shapes: dict[str, str],
        options: dict[str, str] | None = None,
        *,
        results: Callable[..., tuple[Tensor, ...]] = lambda values: (empty_like(next(iter(values.values()))),),
        size: Callable[[Values], int] = lambda values: 1,
        autocast: Iterable[str] | Callable[[Values], Values] = (),
        one_dtype: bool = False,
        validate: Callable[[Values, dict[str, int]], None] | None = None,
        kept: int = 0,
        outside: dict[str, Callable[[Tensor], Tensor]] | None = None,
    ):
        signature = inspect.signature(function)
        self.name, self.__doc__, self.__signature__ = function.__name__, function.__doc__, signature
        self.__name__ = self.name
        self.names = tuple(signature.parameters)
        self.defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
        self.shapes, self.specs = shapes, {name: Spec.parse(text) for name, text in shapes.items()}
        self.parameters = tuple(name for name, spec in self.specs.items() if (1, "B") not in spec.sizes)
        self.options = options or {}
        self.results, self.size, self.validate = results, size, validate
        self.autocast, self.one_dtype, self.kept = autocast, one_dtype, kept
        self.outside = outside or {}

        inner = [name for name in self.names if name not in self.outside]
        images = [name for name in inner if name in self.specs and self.specs[name].is_image]
        others = [n for n in inner if n in self.specs and self.specs[n].is_floating and n not in images]
        self.inner, self.differentiable = inner, images + others  # as backward and its kernels take and return them
        self._register()

    # What users call

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        values = self._bind(args, kwargs)
        values = self.autocast(values) if callable(self.autocast) else to_autocast_dtype(values, self.autocast)
        sizes = check_tensors(self.name, self.one_dtype, **self._with_shapes(values))
        for name, kind in self.options.items():
            if kind == "str?":
                check_choice(self.name, name, values[name], (None, "gelu"))
        if self.validate:
            self.validate(values, sizes)
        return self.compute(values)

    def compute(self, values: Values) -> R:
        """Return the result for checked values: by the selected backend's kernel, or the reference."""
        if select_backend(self.name, values[self.names[0]], self.size(values)) == "reference":
            return getattr(reference, self.name)(**values)
        results: Any = self.packet(*values.values())
        return results[0] if isinstance(results, tuple | list) else results

    def _with_shapes(self, values: Values) -> dict[str, tuple[Tensor | None, str]]:
        return {name: (values[name], shape) for name, shape in self.shapes.items()}

    def _bind(self, args: tuple, kwargs: dict) -> Values:
        """Return all arguments by name, in the schema's order."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        values = {name: given.get(name, self.defaults.get(name)) for name in self.names}
        missing = [name for name in self.names if name not in given and name not in self.defaults]
        if missing or len(args) > len(self.names) or len(given) < len(args) + len(kwargs) or len(given.keys() - values):
            self.__signature__.bind(*args, **kwargs)  # raises, naming what is wrong
        return values

    # What the dispatcher calls; positional, in the schema's order

    def _register(self):
        types = {name: f"Tensor{'?' if spec.is_optional else ''}" for name, spec in self.specs.items()} | self.options
        schema = {name: f"{types[name]} {name}" for name in self.names}
        returned = ", ".join(["Tensor"] * (self.returns or 1 + self.kept))
        define(self.name, f"({', '.join(schema.values())}) -> ({returned})", self.forward, self.fake)
        kept = [f"Tensor kept_{i}" for i in range(self.kept)]
        read = ", ".join(["Tensor dy", *kept, *(schema[name] for name in self.inner)])
        written = ", ".join(["Tensor"] * len(self.differentiable))
        backward, schema = f"{self.name}_backward", self.backward_schema or f"({read}) -> ({written})"
        define(backward, schema, self.backward, self.fake_backward)
        differentiate = partial(torch.library.register_autograd, lib=LIBRARY)
        differentiate(f"seemore_fast::{self.name}", self._differentiate, setup_context=self._save)
        differentiate(f"seemore_fast::{backward}", partial(refuse_second_derivative, self.name))
        self.packet, self.backward_packet = (getattr(torch.ops.seemore_fast, name) for name in (self.name, backward))

    def forward(self, *args: Any) -> Any:
        """Return the dispatcher's results, computed by a kernel."""
        values = dict(zip(self.names, args, strict=True))
        results = self.results(values)
        x = args[0]
        lookup_kernel(self.name, x, self.size(values))(*results, *(self._as_read(n, v, x) for n, v in values.items()))
        return results[0] if len(results) == 1 else results

    def fake(self, *args: Any) -> Any:
        """Return the dispatcher's results without values, after a check of shapes."""
        values = dict(zip(self.names, args, strict=True))
        check_shapes(self.name, **self._with_shapes(values))
        results = self.results(values)
        return results[0] if len(results) == 1 else results

    def backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradients of `differentiable`, computed by a kernel."""
        return self.backward_into({}, dy, *args)

    def backward_into(
        self, into: dict[str, Tensor | None], dy: Tensor, *args: Any, residual: Tensor | None = None, **options: Any
    ) -> tuple[Any, ...]:
        """Return the gradients of `differentiable`, each in the memory of `into` if that has it; None is not computed.

        `residual` is added to the gradient of the first tensor. `options` are those of Triton's kernels alone.
        """
        kept, values = args[: self.kept], dict(zip(self.inner, args[self.kept :], strict=True))
        gradients: dict[str, Any] = self._gradients_like(values) | into
        written = [None if values[name] is None else gradients[name] for name in self.differentiable]
        unread = {name for name, spec in self.specs.items() if "unread" in spec.words}
        x, size = values[self.names[0]], self.size(values)
        read = (self._as_read(n, v, x) for n, v in values.items() if n not in unread)
        if residual is not None and backend_of(self.name, x, size) == "triton":
            options, residual = options | {"residual": residual}, None
        lookup_kernel(self.name, x, size, "_backward")(*written, dy, *kept, *read, **options)
        if residual is not None:
            gradients[self.names[0]].add_(residual)
        return tuple(gradients.values())

    def fake_backward(self, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return gradients without values."""
        return tuple(self._gradients_like(dict(zip(self.inner, args[self.kept :], strict=True))).values())

    def _gradients_like(self, values: Values) -> dict[str, Tensor]:
        x, gradients = values[self.names[0]], {}
        for name in self.differentiable:
            value = values[name]
            if value is None:
                gradients[name] = x.new_empty(0)
            elif self.specs[name].is_image:
                gradients[name] = empty_like(value)
            else:
                gradients[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
        return gradients

    def _as_read(self, name: str, value: Any, x: Tensor) -> Any:
        """Return an argument as kernels take it."""
        if self.options.get(name) == "str?":
            return value == "gelu"
        if not isinstance(value, Tensor) or self.specs[name].is_image:
            return value
        if "stencil" in self.specs[name].words:
            return stencil(value, x)
        return value.contiguous()

    def _save(self, ctx: Any, inputs: tuple, output: Any):
        values = dict(zip(self.names, inputs, strict=True))
        kept = output[1:] if self.kept else ()
        ctx.mark_non_differentiable(*kept)
        ctx.dtypes = {name: values[name].dtype for name in self.outside if values[name] is not None}
        ctx.values = {name: values[name] for name in self.inner if name not in self.specs}
        ctx.save_for_backward(*kept, *(values[name] for name in self.inner if name in self.specs))

    def _differentiate(self, ctx: Any, dy: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        kept = [next(saved) for _ in range(self.kept)]
        values = {name: ctx.values[name] if name in ctx.values else next(saved) for name in self.inner}
        found = self.backward_packet(dy, *kept, *values.values())
        found = dict(zip(self.differentiable, found if isinstance(found, (tuple, list)) else [found], strict=True))
        gradients = {name: gradient for name, gradient in found.items() if values[name] is not None}
        for name, function in self.outside.items():
            if name in ctx.dtypes and ctx.needs_input_grad[self.names.index(name)]:
                gradients[name] = function(dy).to(ctx.dtypes[name])
        return tuple(gradients.get(name) for name in self.names)
