"""Structure of a module: the modules inside, compared at every call with those that it was built with.

The comparisons are loops of C: a network has hundreds of modules, and a call on a GPU a fraction of a millisecond.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any

import torch.nn as nn
from torch import Tensor

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _values(dicts: Iterable[dict]) -> Iterator:
    return chain.from_iterable(map(dict.values, filter(None, dicts)))


class Structure:
    """Modules inside of `root`, itself among them, and the shapes of their parameters, as they are when it is made.

    options: by the type of a module, names of its attributes whose values are compared as well.

    Copying or pickling a module copies its structure with the modules that it names.
    """

    def __init__(self, root: nn.Module, options: dict[type, tuple[str, ...]]):
        self._modules = tuple(root.modules())
        self._types = [*map(type, self._modules)]
        self._options = [(m, name, getattr(m, name)) for m in self._modules for name in options.get(type(m), ())]
        self._attributes = [*map(vars, self._modules)]
        self._tree = self._tree_now()
        self._shapes = [*map(attrgetter("shape"), self.parameters())]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_attributes"}

    def __setstate__(self, state: dict[str, Any]):
        vars(self).update(state)
        self._attributes = [*map(vars, self._modules)]

    def parameters(self) -> list[Tensor]:
        """Return the parameters in the state dict's order; one that two modules share comes twice."""
        return [weight for weight in self._slots() if weight is not None]

    def _slots(self) -> Iterator[Tensor | None]:
        return _values(map(itemgetter("_parameters"), self._attributes))

    def has_shapes(self, weights: list[Tensor]) -> bool:
        """Return whether the parameters, which are `weights`, have the shapes that they were built with."""
        return [*map(attrgetter("shape"), weights)] == self._shapes

    def has_modules(self) -> bool:
        """Return whether the modules are those it was built with, without additions but to the root."""
        inside = self._attributes[1:]
        return (
            [*map(type, self._modules)] == self._types
            and not any(chain.from_iterable(map(itemgetter(*HOOKS), inside)))
            and not any(map(contains, inside, repeat("forward")))
            and self._tree_now() == self._tree
            and all(getattr(module, name) == value for module, name, value in self._options)
        )

    def _tree_now(self) -> tuple[list[int], list[nn.Module]]:
        """Return how many children each module has, and all of them."""
        children = [*map(itemgetter("_modules"), self._attributes)]
        return [*map(len, children)], [*_values(children)]
