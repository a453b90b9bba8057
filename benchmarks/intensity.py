"""Print the bytes and operations of each operator and the shortest time that an H200 needs for them.

    python benchmarks/intensity.py

For T at 480x640: x is (1, 36, 480, 640). benchmarks/README.md contains the table.
"""

import math
from typing import NamedTuple

from seemore_fast.benchmarks.cases import IN_MORE, IN_SEE, OPERATORS, PHOTO, Setting, in_mode

ERF = 21  # instructions of erff: nvcc 13.0, sm_90, counted in the SASS without loads of constants
COPY = 4.3e12  # bytes per second, read and written
VECTOR, MATRIX = 67e12, 990e12  # operations per second: float32 multiply-adds; dense bfloat16 on the tensor cores


class Work(NamedTuple):
    """The work of an operator for each element of x.

    LayerNorms, products and residuals, a few operations each, are left out, and so are parameters and small maps.
    """

    images: float  # of the size of x, read or written
    vector: float = 0  # multiply-adds outside matrices: depthwise convolutions, interpolation and pool
    matrix: float = 0  # multiply-adds of pointwise and dense convolutions
    erfs: float = 0  # of GELU or its gradient

    def operations(self) -> float:
        """Return the sum, where a multiply-add is two operations and an erf is ERF multiply-adds."""
        return 2 * (self.vector + self.matrix + ERF * self.erfs)

    def bytes(self, size: int) -> float:
        return self.images * size

    def floor(self, size: int) -> tuple[float, str]:
        """Return seconds and the limiting resource; float32's matrices (size 4) run on the units of the rest."""
        vector, matrix = 2 * (self.vector + ERF * self.erfs) / VECTOR, 2 * self.matrix / MATRIX
        if size == 4:
            vector, matrix = vector + 2 * self.matrix / VECTOR, 0
        return max((self.bytes(size) / COPY, "memory"), (vector, "FMA"), (matrix, "tensor"))


def fused(images: int, *parts: Work) -> Work:
    """Return the work of several operators in one, whose intermediate results are neither written nor read."""
    return Work(images, *map(sum, zip(*(part[1:] for part in parts), strict=True)))


def multiply_adds(operator: str, mode: str = "forward", **options) -> float:
    """Return an operator's multiply-adds for each element of x."""
    setting = Setting(PHOTO, mode=mode, **options)
    return in_mode(OPERATORS[operator].operations(setting), mode) / 2 / math.prod(PHOTO)


def all_work() -> dict[str, Work]:
    """Return the work of every operator by name; for those with stencils or pools, backward, too."""
    table = {}
    for mode in ("forward", "backward"):
        gradients = mode == "backward"  # as many results as inputs, and the result's own gradient
        stripes = {"K=11": {"taps": 11}, "K=11 gate": IN_SEE, "K=3 gelu": IN_MORE}
        for name, options in stripes.items():
            images = 3 + 2 * gradients if options.get("gated") else 2 + gradients
            vector = multiply_adds("striped_conv", mode, **options)
            table[f"striped_conv {name}, {mode}"] = Work(images, vector, erfs="activation" in options)
        calibrate = multiply_adds("calibrate", mode, recursive=2)
        table[f"calibrate, {mode}"] = Work(2 + gradients, calibrate, erfs=1 / 16 + 1 / 256)
        # The pool's additions, each in the place of a multiply-add
        table[f"router, {mode}"] = Work(1, 2 * multiply_adds("router", mode))
    expand = Work(3, matrix=multiply_adds("norm_pointwise"), erfs=2)
    conv = Work(3, matrix=multiply_adds("norm_conv3x3"), erfs=1)
    ffn = Work(2, vector=9, matrix=multiply_adds("gated_ffn") - 9, erfs=3)
    experts, projection = (Work(3, matrix=multiply_adds(name)) for name in ("low_rank_experts", "pointwise"))
    more = (table[f"{name}, forward"] for name in ("striped_conv K=3 gelu", "calibrate", "router"))
    return table | {
        "norm_pointwise C to 2C gelu": expand,
        "norm_conv3x3 C to C gelu to 2C": conv,
        "gated_ffn": ffn,
        "low_rank_experts, rank 8": experts,
        "rme_block": fused(2, conv, *more, experts, projection, ffn),
        "sme_block": fused(2, expand, table["striped_conv K=11 gate, forward"], projection, ffn),
    }


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| | MB fp32 | MB bf16 | M FMA vector | M FMA matrix | M erf | op/B fp32 | bf16 | floor fp32, µs | bf16, µs |",
        f"|--{'|--:' * 9}|",
    ]
    million = math.prod(PHOTO) / 1e6
    for name, work in all_work().items():
        amounts = [f"{work.bytes(size) * million:.1f}" for size in (4, 2)]
        amounts += [f"{amount * million:,.0f}" for amount in (work.vector, work.matrix, work.erfs)]
        amounts += [f"{work.operations() / work.bytes(size):.1f}" for size in (4, 2)]
        amounts += [f"{seconds * million * 1e12:.1f} {limit}" for seconds, limit in map(work.floor, (4, 2))]
        lines.append(f"| {' | '.join([name, *amounts])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
