"""The table of operators: the examples by which tests/test_conformance.py tests each promise of each of them.

A new operator is a new row; what is peculiar to it stands in tests/test_<op>.py.
"""

import itertools
import re
from collections.abc import Iterable

import torch

from seemore_fast import reference

from .cases import FLOAT32, case, extra, grid, joined
from .faults import BATCH_AND_PIXELS, FAULTS
from .ops import LAYOUTS, SHAPES

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"dtype": [FLOAT, BFLOAT, HALF]}
LAST = {"layout": [None, "channels_last"]}


def bad(name: str, values: Iterable, message: str) -> tuple[tuple[dict, str], ...]:
    """Return values of an option with what the error says of each."""
    return tuple(({name: value}, message.format(value)) for value in values)


BAD_ACTIVATIONS = bad("activation", ("relu", "GELU", "", False), "activation is {!r}, expected one of None, 'gelu'$")
NO_IMAGE = grid(shape=(0, 3, 4, 5), dtype=FLOAT)
EPS = grid({"eps": [1e-12, 0.5]})
OFFSET = dict(offset=1000, dtype=FLOAT)  # the mean is subtracted before anything is squared or rounded
SPREAD = {"spread": [1, 300]}  # squares of 300 overflow float16: the statistics must not be computed in it

GATED = {"activation, gated": [(None, False), ("gelu", False), (None, True), ("gelu", True)]}
NORMED = {"norm, pointwise, activation": list(itertools.product([True, False], [True, False], ["gelu", None]))}
PAIRS = ("norm_weight", "norm_bias", "weight_pw", "bias_pw")
MIXTURES = [((1,), 1), ((3,), 1), ((5, 2), 1), ((3, 3, 3), 2), ((2, 3, 4, 5, 6, 7), 4)]
MIXTURES += [((2, 4, 8), top_k) for top_k in (1, 2, 3)]

# the CPU's tiles: bands of 256 rows, columns of 1024 (64 where channels lie side by side), 64 channels
CPU_TILES = [((2, 1, 530, 3), None), ((1, 1, 2, 1060), None), ((1, 70, 3, 150), "channels_last")]
# CUDA's strips: of 64 or 128 columns, neighbours to the right and below, widths of quads and not, two a warp
CUDA_STRIPS = [
    ((2, 3, 90, 260), FLOAT, "gelu", True),
    ((1, 2, 64, 128), FLOAT, None, False),
    ((1, 3, 83, 129), BFLOAT, None, True),
    ((3, 1, 41, 64), HALF, "gelu", False),
    ((1, 2, 130, 348), BFLOAT, "gelu", True),
    ((3, 3, 20, 12), FLOAT, None, True),
]
# CUDA's kernels differ by dtype, taps, rows that are quads or not, and whether the gradient of s is stored
CUDA_KERNELS = DTYPES | {
    "taps": [3, 7, 11],
    "shape": [(2, 2, 23, 15), (2, 2, 23, 16)],
    "activation, gated": [(None, False), ("gelu", True)],
}
MANY_ROWS = grid({"shape": [(1, 4, 40, 40), (2, 3, 51, 33)]}, dtype=FLOAT)  # what a step leaves for the next one

CASES = [
    case(
        "striped_conv",
        values=grid({"shape": SHAPES, "taps": [1, 3, 7, 11, 31]}, activation="gelu") + grid(GATED),
        sizes=NO_IMAGE,
        layouts=grid({"layout": LAYOUTS} | GATED),
        narrow=grid(DTYPES | LAST | {"taps": [3, 11]}, shape=(2, 8, 17, 19), activation="gelu"),
        larger=grid({"shape, layout": CPU_TILES}, taps=7)
        + grid({"shape, dtype, activation, gated": CUDA_STRIPS, "taps": [3, 7, 11]})
        + grid(CUDA_KERNELS),
        gradcheck=grid(GATED, shape=(2, 2, 3, 4)),
        compiles=grid(activation="gelu"),
        opcheck=grid(GATED | LAST),
        writes=grid(LAST | GATED, shape=(2, 9, 13, 19), taps=11),
        offsets=grid(shape=(2, 2, 3, 5), taps=3, dtype=BFLOAT, activation="gelu"),
        deterministic=grid(shape=(2, 3, 70, 40), taps=11, dtype=FLOAT, activation="gelu"),
        # also where a thread goes on from one image to the next with the same buffers
        alone=grid({"taps, shape": [(n, (3, 2, 14, w)) for n, w in [(3, 13), (11, 64), (7, 9), (5, 20)]]}, dtype=FLOAT),
        autocast=grid(shape=(2, 8, 6, 7), activation="gelu", dtype=FLOAT),
        exempt={"none": ("gate",)},
        free=(),
        bad_options=(
            *bad("taps", (0, 2, 4), "weight_row has {} taps, expected an odd number$"),
            *BAD_ACTIVATIONS,
        ),
        not_interpreted=("gradcheck", "alone"),
    ),
    case(
        "striped_conv_router",
        join=joined,
        layouts=grid({"layout": LAYOUTS}, shape=(2, 3, 9, 13), dtype=FLOAT),
        larger=grid(
            {"shape, taps": [((2, 3, 6, 7), 3), ((2, 5, 41, 130), 3), ((1, 2, 90, 260), 11), ((3, 4, 23, 64), 7)]},
            dtype=FLOAT,
            activation="gelu",
        )
        + grid(shape=(1, 70, 3, 150), layout="channels_last", dtype=FLOAT),
        gradcheck=[],
        compiles=grid(activation="gelu", dtype=FLOAT),
        opcheck=grid(activation="gelu", dtype=FLOAT),
        writes=grid(shape=(2, 3, 13, 19), activation="gelu", dtype=FLOAT),
        offsets=[],
        deterministic=grid(shape=(2, 3, 70, 40), activation="gelu", dtype=FLOAT),
        alone=grid({"shape": [(3, 2, 9, 19), (3, 2, 9, 64)]}, dtype=FLOAT),
        double_backward=[],  # striped_conv's and router's
        autocast=[],
        free=(*BATCH_AND_PIXELS, ("weight_router", 0)),
        bad_options=(({"top_k": 4}, "top_k is 4"), *BAD_ACTIVATIONS),
        not_interpreted=("alone",),
    ),
    case(
        "calibrate",
        values=grid(
            {
                "shape, recursive": [
                    ((1, 1, 4, 4), 1),  # a small map of one pixel
                    ((2, 3, 5, 7), 1),  # what 4x4 blocks do not cover is dropped, the map is stretched over it
                    ((0, 3, 5, 7), 1),
                    ((1, 5, 4, 31), 1),
                    ((1, 36, 9, 8), 1),
                    ((1, 1, 16, 16), 2),
                    ((2, 3, 17, 31), 2),
                    ((1, 4, 35, 66), 2),
                    ((1, 2, 64, 69), 3),
                ]
            }
        ),
        sizes=NO_IMAGE,
        layouts=grid({"layout": LAYOUTS, "shape, recursive": [((2, 3, 9, 14), 1), ((2, 3, 17, 20), 2)]}),
        narrow=grid(DTYPES | LAST | {"recursive": [1, 2]}, shape=(2, 8, 33, 35)),
        larger=grid(
            {
                "shape, recursive, dtype": [
                    ((1, 50, 4, 12), 1, None),  # the C x C matrix in squares of 48
                    ((3, 97, 8, 5), 1, None),
                    ((1, 1, 4, 1100), 1, None),  # more columns than a block's threads hold at once
                    ((1, 1, 5, 2101), 1, None),  # and than its sums
                    ((1, 2, 64, 2064), 2, None),
                    ((1, 1, 376, 364), 1, None),  # more pixels of the small map than parts
                    ((4, 132, 16, 144), 1, None),  # several patches for a thread
                    ((4, 132, 16, 144), 2, BFLOAT),
                    ((1, 3, 128, 192), 3, FLOAT),
                    ((1, 1, 1100, 5), 1, None),  # the CPU's bands of 256 rows, and of 1024 pixels of the small map
                ]
            }
        )
        + grid(shape=(1, 20, 8, 9), layout="channels_last")  # 16 channels side by side
        # rows of multiples of 16 or 8 bytes are read so; those inside a larger tensor are not aligned
        + grid(DTYPES | {"layout": [None, "slice"], "shape, recursive": [((2, 3, 18, 32), 1), ((1, 3, 37, 72), 2)]}),
        gradcheck=grid({"shape, recursive": [((2, 2, 5, 9), 1), ((1, 1, 16, 18), 2)]}),
        other={"shape": (3, 3, 11, 17)},
        opcheck=grid(LAST),
        writes=grid(
            {
                "shape, recursive, layout": [
                    ((2, 9, 21, 16), 1, None),
                    ((2, 9, 21, 18), 1, "channels_last"),
                    ((2, 3, 35, 48), 2, None),
                    ((1, 2, 68, 66), 3, None),
                    ((1, 50, 4, 4), 1, None),
                ]
            }
        ),
        offsets=grid(shape=(2, 2, 5, 8), dtype=BFLOAT),
        deterministic=grid(shape=(2, 3, 70, 40), recursive=2, dtype=FLOAT),
        alone=grid({"shape, recursive": [((2, 3, 9, 14), 1), ((3, 2, 32, 64), 2)]}, dtype=FLOAT),
        double_backward=grid(shape=(1, 1, 4, 5), dtype=FLOAT),
        free=(("k", 0), ("k", 2), ("k", 3)),
        bad_options=(
            *(
                ({"shape": (1, 3, h, w), "recursive": n}, f"k is {h}x{w} pixels, expected at least {4**n}x{4**n}")
                for h, w, n in [(3, 4, 1), (4, 3, 1), (15, 16, 2), (16, 15, 2), (63, 64, 3)]
            ),
            *bad("recursive", (0, -1, 1.0, "1", None), "recursive is {!r}, expected an integer of at least 1$"),
        ),
        not_interpreted=("gradcheck", "alone"),
    ),
    case(
        "router",
        join=joined,
        values=grid({"shape": SHAPES, "experts, top_k": [(1, 1), (3, 1), (4, 2), (5, 5)]})
        + grid({"shape": SHAPES, "top_k": [1, 2, 3]}, experts=3, sharpness=1),
        # more than one tile of a plane, and more numbers than a program of Triton's has at a time
        sizes=grid({"shape, experts, top_k": [((2, 3, 70, 70), 3, 2), ((1, 70, 3, 5), 130, 130)]}) + NO_IMAGE,
        # Kernels sum parts of runs of 16 bytes: planes, odd and even ones, or images whose channels lie side by side
        # and repeat after 1 to 301 vectors, which is more than a block has.
        larger=grid(
            {
                "shape": [(2, 3, 97, 131), (1, 2, 96, 264), (1, 1, 1, 40_001), (2, 36, 24, 40), (1, 301, 5, 7)],
                "dtype": [None, FLOAT, BFLOAT],
                "layout": [None, "channels_last", "slice"],
            },
            sharpness=0.5,
        )
        + grid(DTYPES | LAST, shape=(2, 520, 3, 5), sharpness=0.5)
        # means that do not fit shared memory, and as many experts as kernels take
        + grid({"shape, experts, top_k": [((2, 6000, 1, 2), 7, 3), ((2, 9, 2, 3), 1024, 1024)]}),
        layouts=grid({"layout": LAYOUTS}) + grid({"layout": LAYOUTS}, sharpness=1),
        gradcheck=grid({"top_k": [1, 2, 3]}, shape=(2, 2, 3, 4), experts=3, sharpness=1),
        other={"shape": (2, 5, 9, 4)},
        opcheck=grid({"shape": [(3, 5, 6, 7), (0, 5, 6, 7)]}) + grid(layout="channels_last", dtype=BFLOAT),
        writes=grid(LAST | {"shape": [(2, 9, 13, 19), (0, 3, 4, 5)]}),
        offsets=grid({"shape": [(2, 2, 3, 5), (2, 2, 40, 52)], "dtype": [FLOAT, BFLOAT]}),
        deterministic=grid(LAST, shape=(3, 20, 70, 40), dtype=BFLOAT),
        alone=grid(shape=(3, 5, 7, 20), sharpness=1, dtype=FLOAT),
        double_backward=grid(shape=(1, 2, 2, 2), sharpness=1, dtype=FLOAT),
        autocast=[],
        free=(("a", 0), ("a", 2), ("a", 3), ("weight", 0)),
        bad_options=bad("top_k", (0, -1, 5, 1.0, "1", None), "top_k is {!r}, expected 1 to 4, the number of experts$"),
        not_interpreted=("gradcheck", "alone"),
    ),
    case(
        "norm_pointwise",
        values=grid({"shape, out": [(shape, 2 * shape[1]) for shape in SHAPES], "activation": [None, "gelu"]})
        + grid({"out": [1, 3, 40]}, activation="gelu", residual=True)
        + EPS,
        sizes=grid(
            {"shape, out": [((1, 36, 7, 41), 72), ((2, 36, 4, 4), 36)], "dtype": [FLOAT, BFLOAT]}, activation="gelu"
        )
        + grid({"shape, out": [((1, 48, 3, 9), 96), ((1, 64, 6, 5), 128)]}, activation="gelu", dtype=FLOAT)
        + grid({"shape, out": [((3, 1, 1, 1), 1), ((2, 17, 1, 33), 3), ((1, 5, 70, 1), 31)], "dtype": [FLOAT, BFLOAT]})
        + grid(shape=(1, 36, 5, 6), out=8, **OFFSET)
        + NO_IMAGE,
        layouts=grid({"layout": LAYOUTS, "activation": [None, "gelu"]})
        + extra(grid({"layout": LAYOUTS}, shape=(2, 5, 6, 7), out=9, activation="gelu", dtype=FLOAT)),
        narrow=grid(DTYPES | LAST | SPREAD, shape=(2, 8, 17, 19), out=16, activation="gelu"),
        too_wide=grid(shape=(1, 65, 2, 3), out=8, dtype=FLOAT),
        products=grid(shape=(1, 5, 20, 19), out=7, activation="gelu", dtype=FLOAT),
        gradcheck=grid({"activation": [None, "gelu"]}, shape=(2, 3, 2, 3)),
        compiles=grid(activation="gelu") + grid(activation="gelu", dtype=FLOAT),
        opcheck=grid(activation="gelu", eps=1e-6, dtype=FLOAT),
        writes=grid(activation="gelu", dtype=FLOAT),
        deterministic=grid(activation="gelu", dtype=FLOAT),
        autocast=grid(shape=(2, 8, 6, 7), activation="gelu", dtype=FLOAT),
        exempt={"none": ("norm_weight", "norm_bias")},
        bad_options=(
            *(({name: None}, rf".*\b{name}\b.* None") for name in ("norm_weight", "norm_bias")),
            *BAD_ACTIVATIONS,
        ),
    ),
    case(
        "pointwise",
        kernel="norm_pointwise",
        values=grid({"shape": SHAPES, "residual": [False, True], "activation": [None, "gelu"]}),
        layouts=grid({"layout": LAYOUTS}),
        narrow=grid(
            DTYPES
            | {"layout": [None, *LAYOUTS]}
            | {"shape, out": [((2, 36, 5, 9), 36), ((1, 5, 1, 70), 64), ((3, 17, 33, 1), 5)]}
        ),
        gradcheck=grid(shape=(2, 2, 3, 2), activation="gelu"),
        opcheck=[],  # it is an operator of norm_pointwise's
        exempt={"none": ("residual",)},
        free=(),
        bad_options=BAD_ACTIVATIONS,
    ),
    case(
        "norm_conv3x3",
        values=grid({"shape, middle, out": [(shape, shape[1], 2 * shape[1]) for shape in SHAPES]} | NORMED)
        + grid({"middle, out": [(1, 1), (7, 2), (2, 19)]})
        + EPS,
        sizes=grid(
            {
                "shape, norm, pointwise, activation, middle, out": [
                    ((1, 36, 5, 17), True, True, "gelu", 36, 72),  # more than one tile of pixels
                    ((1, 36, 3, 4), True, False, None, 36, 0),
                    ((2, 8, 1, 4), False, False, "gelu", 48, 0),
                    ((3, 1, 1, 1), True, True, "gelu", 1, 1),
                    ((2, 5, 1, 33), False, True, None, 10, 3),
                    ((1, 5, 70, 1), True, True, "gelu", 1, 31),
                    ((2, 17, 2, 3), False, False, None, 5, 0),
                ],
                "dtype": [FLOAT, BFLOAT],
            }
        )
        + grid({"shape, middle, out": [((1, 48, 2, 5), 48, 96), ((1, 64, 3, 7), 64, 128)]}, dtype=FLOAT)
        + grid(shape=(1, 64, 3, 7), middle=64, out=128, norm=False, dtype=FLOAT)
        + grid(shape=(1, 36, 5, 6), pointwise=False, **OFFSET)
        + grid({"pointwise": [True, False]}, shape=(0, 3, 4, 5), dtype=FLOAT),
        layouts=grid({"layout": LAYOUTS} | NORMED)
        + extra(grid({"layout": LAYOUTS, "norm": [True, False]}, shape=(2, 5, 6, 7), dtype=FLOAT)),
        narrow=grid(DTYPES | LAST | SPREAD, shape=(2, 8, 9, 11), middle=8, out=16),
        larger=MANY_ROWS,
        too_wide=grid(shape=(1, 65, 2, 3), dtype=FLOAT) + grid({"middle, out": [(65, 4), (5, 129)]}, dtype=FLOAT),
        products=grid(shape=(1, 5, 20, 19), dtype=FLOAT),
        gradcheck=grid(NORMED, shape=(2, 3, 2, 3), middle=2, out=3),
        compiles=grid({"norm, pointwise": [(True, True), (False, False)], "dtype": [None, FLOAT]}),
        opcheck=grid({"norm, pointwise": [(True, True), (False, False)]}, eps=1e-6, dtype=FLOAT),
        writes=grid({"norm, pointwise": [(True, True), (False, False)]}, dtype=FLOAT),
        offsets=grid({"norm": [True, False]}, dtype=BFLOAT),
        deterministic=grid({"norm, pointwise": [(True, True), (False, False)]}, dtype=FLOAT),
        exempt={"none": PAIRS},
        bad_options=(
            *(({name: None}, rf".*\b{name}\b.* None") for name in PAIRS),
            *BAD_ACTIVATIONS,
        ),
    ),
    case(
        "conv3x3_shuffle",
        values=grid(
            {
                "shape, picture, scale": [
                    ((2, 3, 6, 7), 1, 2),
                    ((1, 5, 1, 9), 3, 1),
                    ((2, 7, 5, 1), 2, 3),
                    ((1, 1, 1, 1), 1, 5),
                ]
            },
            img_range=2.5,
        ),
        sizes=grid(
            {
                "shape, picture, scale": [
                    ((1, 36, 5, 17), 3, 4),
                    ((2, 5, 3, 7), 3, 3),
                    ((1, 48, 4, 3), 1, 7),
                    ((2, 3, 1, 5), 4, 2),
                    ((1, 1, 9, 1), 1, 1),
                ]
            },
            img_range=255.0,
            dtype=FLOAT,
        ),
        layouts=grid({"layout": LAYOUTS}),
        too_wide=grid(shape=(1, 3, 2, 3), scale=5, dtype=FLOAT),
        gradcheck=grid(shape=(2, 2, 3, 2), picture=1, img_range=3.0),
        opcheck=grid(img_range=1.0, dtype=FLOAT),
        offsets=FLOAT32,
        faults=tuple(fault for fault in FAULTS if fault != "dtype"),  # dtypes may differ
        bad_options=tuple(
            (options, "(scale|img_range|weight) .*, expected")
            for options in ({"scale": 0}, {"scale": 2.0}, {"scale": 3}, {"img_range": 0})
        ),
    ),
    case(
        "gated_ffn",
        values=grid({"shape": SHAPES}) + EPS,
        sizes=grid({"shape": [(1, 36, 7, 41), (3, 1, 1, 1), (2, 17, 1, 33), (1, 5, 70, 1)], "dtype": [FLOAT, BFLOAT]})
        # more than 8 strips of Triton's, and 64 columns; no bfloat16: errors of sums of 10,500 pixels are chance, over
        # several seeds as large in the reference, but in this one a quarter
        + extra(grid(shape=(1, 3, 150, 70), dtype=FLOAT))
        + grid({"shape": [(1, 48, 3, 9), (1, 64, 3, 5)]}, dtype=FLOAT)
        + NO_IMAGE,
        layouts=grid({"layout": LAYOUTS}) + extra(grid({"layout": LAYOUTS}, shape=(2, 5, 6, 7), dtype=FLOAT)),
        narrow=grid(DTYPES | LAST | SPREAD, shape=(2, 8, 17, 19)),
        larger=MANY_ROWS,
        gradcheck=grid(shape=(2, 3, 2, 3)),
        compiles=grid({"dtype": [None, FLOAT]}),
        opcheck=grid(eps=1e-6, dtype=FLOAT),
        alone=grid(shape=(3, 4, 5, 6), dtype=FLOAT),
    ),
    case(
        "low_rank_experts",
        values=grid({"shape": SHAPES, "ranks, top_k": MIXTURES})
        + grid({"ranks, top_k": [((2, 4, 8), 1), ((3, 3), 2)]}, shape=(2, 4, 3, 5), projected=True),
        sizes=grid(
            {
                "shape, ranks, top_k": [
                    ((2, 36, 5, 27), (2, 4, 8), 1),  # more than one tile of pixels
                    ((1, 48, 3, 7), (2, 4, 8), 2),
                    ((2, 5, 1, 70), (1, 33, 64), 2),
                    ((3, 64, 2, 3), (64,), 1),
                    ((2, 1, 1, 1), (1, 2), 2),
                    ((2, 17, 9, 1), (2, 3, 4, 5, 6, 7), 4),
                ],
                "projected": [False, True],
            },
            dtype=FLOAT,
        )
        + NO_IMAGE,
        layouts=grid({"layout": LAYOUTS}),
        narrow=grid(DTYPES | LAST | {"top_k": [1, 3]}, shape=(3, 8, 17, 19))
        + grid(
            {"dtype": [BFLOAT, HALF], "layout": [None, "channels_last", "slice"]}, shape=(2, 12, 9, 13), projected=True
        ),
        too_wide=grid(shape=(1, 5, 3, 4), ranks=(65,), top_k=1, dtype=FLOAT),
        gradcheck=grid({"ranks, top_k": [((2,), 1), ((1, 2, 3), 1), ((1, 2, 3), 2), ((2, 1), 2)]}, shape=(2, 2, 2, 3)),
        compiles=grid({"dtype": [None, FLOAT]}),
        other={"shape": (4, 5, 7, 3)},  # with other experts chosen, too: the choice is data
        offsets=FLOAT32,
        exempt={"dtype": ("expert_weight",), "list": ("expert_index",)},  # the former is float32 with any a
        free=(),
        bad_options=(
            *(
                ({"ranks": ranks}, "ranks are " + re.escape(repr(ranks)) + ", expected 3 positive .* add up to 14")
                for ranks in [(2, 4, 7), (2, 4, 9), (2, 12), (2, 4, 4, 4), (0, 6, 8), (-2, 8, 8), ()]
            ),
            *(({"ranks": ranks}, "ranks (are|is) .*expected") for ranks in ([2.0, 4.0, 8.0], "248", 14, None)),
            *(({"projected": True, n: None}, f".*{n}.* None") for n in ("weight_proj", "bias_proj", "residual")),
        ),
    ),
]

BY_NAME = {case.name: case for case in CASES}

LAYER_NORM = case(  # the reference's alone; its two layouts take different paths
    "layer_norm",
    operator=reference.layer_norm,
    values=grid({"shape": SHAPES, "eps": [1e-6, 0.5]} | LAST) + grid({"layout": LAYOUTS}),
    gradcheck=grid(LAST, shape=(2, 3, 2, 3)),
    other={"shape": (3, 8, 9, 5)},
)
