"""Print what each operator has to move and to compute, and the time below which an H200 cannot do it.

    python benchmarks/intensity.py

For T at 480x640: x is (1, 36, 480, 640). The table stands in benchmarks/README.md.
"""

from typing import NamedTuple

from seemore_fast.benchmarks import bench_calibrate, bench_router, bench_striped_conv, operators

CHANNELS = operators.PHOTO[1]
PIXELS = operators.PHOTO[2] * operators.PHOTO[3]
RANK = 8  # of T's largest expert, of which it chooses one
ERF = 21  # instructions of erff: nvcc 13.0, sm_90, counted in the SASS without loads of constants
COPY = 4.3e12  # bytes per second, read and written
VECTOR, MATRIX = 67e12, 990e12  # operations per second: float32 multiply-adds; dense bfloat16 on the tensor cores


class Work(NamedTuple):
    """What an operator does for all pixels. LayerNorms, products and residuals, a few per element, are left out."""

    images: int  # of the size of x, that are read or written; parameters and small maps are left out
    vector: float = 0  # multiply-adds outside of matrices: those of depthwise convolutions, interpolation and pool
    matrix: float = 0  # multiply-adds of pointwise and dense convolutions
    erfs: float = 0  # those of GELU or of its gradient

    def __add__(self, other: "Work") -> "Work":
        """Return the work of two operators in one: what goes from one to the other is neither written nor read."""
        return Work(self.images, *(mine + theirs for mine, theirs in zip(self[1:], other[1:], strict=True)))

    def operations(self) -> float:
        """Return the sum, where a multiply-add is two operations and an erf is ERF multiply-adds."""
        return 2 * (self.vector + self.matrix + ERF * self.erfs)

    def bytes(self, size: int) -> int:
        return self.images * CHANNELS * PIXELS * size

    def floor(self, size: int) -> tuple[float, str]:
        """Return seconds, and what takes them: float32's matrices (size 4) share the units of the rest."""
        vector, matrix = 2 * (self.vector + ERF * self.erfs) / VECTOR, 2 * self.matrix / MATRIX
        if size == 4:
            vector, matrix = vector + 2 * self.matrix / VECTOR, 0
        return max((self.bytes(size) / COPY, "memory"), (vector, "FMA"), (matrix, "tensor"))


def pointwise(images: int, inputs: int, outputs: int, gelu: bool = False) -> Work:
    """Return the work of a 1x1 convolution between so many times C channels."""
    return Work(images, matrix=PIXELS * inputs * outputs * CHANNELS**2, erfs=PIXELS * outputs * CHANNELS * gelu)


def all_work() -> dict[str, Work]:
    """Return the work of every operator by name; for those that look around in the image, backward, too."""
    c, n = CHANNELS, PIXELS
    table = {}
    for mode in ("forward", "backward"):
        back = mode == "backward"

        def halved(bench, mode=mode, **options) -> float:
            settings = bench if hasattr(bench, "Setting") else operators  # those with options have one of their own
            return bench.operations(settings.Setting(operators.PHOTO, mode=mode, **options)) / 2

        small = n * c * (1 / 16 + 1 / 256)
        striped = bench_striped_conv
        table |= {
            f"striped_conv K=11, {mode}": Work(3 if back else 2, halved(striped)),
            f"striped_conv K=11 gate, {mode}": Work(5 if back else 3, halved(striped, gated=True)),
            f"striped_conv K=3 gelu, {mode}": Work(
                3 if back else 2, halved(striped, taps=3, activation="gelu"), erfs=n * c
            ),
            f"calibrate, {mode}": Work(3 if back else 2, halved(bench_calibrate), erfs=small),
            f"router, {mode}": Work(1, 2 * halved(bench_router)),  # additions, each in the place of a multiply-add
        }
    striped_gate, striped_gelu, calibrate, router = (
        table[f"{name}, forward"] for name in ("striped_conv K=11 gate", "striped_conv K=3 gelu", "calibrate", "router")
    )
    gate = Work(3, vector=9 * n * c)
    ffn = Work(2) + pointwise(3, 1, 2, gelu=True) + gate + pointwise(2, 1, 1, gelu=True)
    conv = Work(3, matrix=n * 9 * c**2, erfs=n * c) + pointwise(3, 1, 2)
    experts = Work(3, matrix=n * 3 * RANK * c)
    projection = pointwise(2, 1, 1)
    return table | {
        "norm_pointwise C to 2C gelu": pointwise(3, 1, 2, gelu=True),
        "norm_conv3x3 C to C gelu to 2C": conv,
        "gated_ffn": ffn,
        "low_rank_experts, rank 8": experts,
        "rme_block": Work(2) + conv + striped_gelu + calibrate + router + experts + projection + ffn,
        "sme_block": Work(2) + pointwise(3, 1, 2, gelu=True) + striped_gate + projection + ffn,
    }


def table() -> str:
    """Return all of it in Markdown."""
    lines = [
        "| | MB fp32 | MB bf16 | M FMA vector | M FMA matrix | M erf | op/B fp32 | bf16 | floor fp32, µs | bf16, µs |",
        f"|--{'|--:' * 9}|",
    ]
    for name, work in all_work().items():
        amounts = [f"{work.bytes(size) / 1e6:.1f}" for size in (4, 2)]
        amounts += [f"{amount / 1e6:,.0f}" for amount in (work.vector, work.matrix, work.erfs)]
        amounts += [f"{work.operations() / work.bytes(size):.1f}" for size in (4, 2)]
        amounts += [f"{seconds * 1e6:.1f} {what}" for seconds, what in map(work.floor, (4, 2))]
        lines.append(f"| {' | '.join([name, *amounts])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
