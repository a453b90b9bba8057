"""Print the bytes and operations of each operator and the shortest time that an H200 needs for them.

    python benchmarks/intensity.py

For T at 480x640: x is (1, 36, 480, 640). benchmarks/README.md contains the table.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from seemore_fast.benchmarks.cases import OPERATORS, PHOTO, Setting, in_mode, input_shapes, result_shapes

ERF = 21  # instructions of erff: nvcc 13.0, sm_90, counted in the SASS without loads of constants
COPY = 4.3e12  # bytes per second, read and written
VECTOR, MATRIX = 67e12, 990e12  # operations per second: float32 multiply-adds; dense bfloat16 on the tensor cores
DTYPES = torch.float32, torch.bfloat16


class Work(NamedTuple):
    """The work of an operator for each element of x.

    LayerNorms, products and residuals, a few operations each, are left out, and so are parameters and small maps.
    """

    bytes: tuple[float, ...]  # read or written, for each of DTYPES
    vector: float  # multiply-adds outside matrices: depthwise convolutions, interpolation and pool
    matrix: float  # multiply-adds of pointwise and dense convolutions
    erfs: float  # of GELU or its gradient

    def operations(self) -> float:
        """Return the sum, where a multiply-add is two operations and an erf is ERF multiply-adds."""
        return 2 * (self.vector + self.matrix + ERF * self.erfs)

    def floors(self) -> list[tuple[float, str]]:
        """Return seconds and the limiting resource for each of DTYPES; float32's matrices run on the vector units."""
        vector, matrix = 2 * (self.vector + ERF * self.erfs), 2 * self.matrix
        seconds = [((vector + matrix) / VECTOR, 0), (vector / VECTOR, matrix / MATRIX)]
        return [
            max((moved / COPY, "memory"), (on_vectors, "FMA"), (on_matrices, "tensor"))
            for moved, (on_vectors, on_matrices) in zip(self.bytes, seconds, strict=True)
        ]


def bytes_of(name: str, setting: Setting) -> int:
    """Return the bytes of images that have to move; backward has as many results as inputs, and y's gradient."""
    if traffic := OPERATORS[name].traffic:
        return in_mode(traffic(setting), setting.mode)
    inputs, results = input_shapes(name, setting).values(), result_shapes(name, setting)
    read, written = (
        sum(math.prod(shape) for shape in shapes if shape[2:] == setting.shape[2:]) for shapes in (inputs, results)
    )
    return ((2 if setting.mode == "backward" else 1) * read + written) * setting.dtype.itemsize


def work_of(name: str, setting: Setting) -> Work:
    """Return the work of an operator; of those that are fused, intermediate results are neither written nor read."""
    operator, elements = OPERATORS[name], math.prod(setting.shape)
    moved = tuple(bytes_of(name, setting._replace(dtype=dtype)) / elements for dtype in DTYPES)
    if not callable(operator.counted):
        parts = (work_of(part, operator.inside(setting)) for part in operator.counted)
        return Work(moved, *map(sum, zip(*(part[1:] for part in parts), strict=True)))
    multiply_adds = in_mode(operator.operations(setting), setting.mode) / 2 / elements
    vector = multiply_adds if operator.vector is None else operator.vector
    return Work(moved, vector, multiply_adds - vector, operator.erfs(setting))


def all_work() -> Iterator[tuple[str, Work]]:
    """Yield the work of every operator with its name and mode; backward, too, of those without matrices."""
    for name, operator in OPERATORS.items():
        for title, setting in operator.cases()["cuda"].items():
            mode, _, *variant, dtype = title.split()
            is_shown = mode == "forward" or (mode == "backward" and operator.vector is None)
            if is_shown and setting.shape == PHOTO and dtype == "fp32":
                yield f"{' '.join([name, *variant])}, {mode}", work_of(name, setting)


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| | MB fp32 | MB bf16 | M FMA vector | M FMA matrix | M erf | op/B fp32 | bf16 | floor fp32, µs | bf16, µs |",
        f"|--{'|--:' * 9}|",
    ]
    million = math.prod(PHOTO) / 1e6
    for name, work in all_work():
        amounts = [f"{moved * million:.1f}" for moved in work.bytes]
        amounts += [f"{amount * million:,.0f}" for amount in (work.vector, work.matrix, work.erfs)]
        amounts += [f"{work.operations() / moved:.1f}" for moved in work.bytes]
        amounts += [f"{seconds * million * 1e12:.1f} {limit}" for seconds, limit in work.floors()]
        lines.append(f"| {' | '.join([name, *amounts])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
