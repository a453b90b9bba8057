"""The prediction of a training step's time: a warp's walk through machine code, held against Triton's own kernels."""

import json
import sys

import pytest
import torch
from helpers.interpreter import run_without

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from seemore_fast.benchmarks import gpu_model_training, warp

LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x218] ;
        /*0010*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   IADD3 R1, R1, -0x1, RZ ;
        /*0040*/                   FADD R5, R4, R5 ;
        /*0050*/                   ISETP.GT.AND P0, PT, R1, RZ, PT ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   EXIT ;
"""


@triton.jit
def count(y, outer, inner, divisor):
    program = tl.program_id(0)
    total = program // divisor * 1000 + program % divisor
    for i in range(0, outer, 2):
        for j in range(i, inner):
            total = total * 3 + (j ^ i)
    tl.store(y + program, total)


def counted(program: int, outer: int, inner: int, divisor: int) -> int:
    total = program // divisor * 1000 + program % divisor
    for i in range(0, outer, 2):
        for j in range(i, inner):
            total = (total * 3 + (j ^ i)) & 0xFFFFFFFF
    return total


class Storing(warp.Warp):
    """A warp that keeps what it stores."""

    def _execute(self, instruction, uncertain):
        super()._execute(instruction, uncertain)
        if instruction.name == "STG":
            self.stored = self.read(instruction.operands[1])


# In a process of its own: interpreted kernels have no code


def compiled_counts() -> list[dict]:
    """Return what programs of `count` store, and how many instructions they take, for sm_90."""
    from seemore_fast.kernels.launch import Launch

    found = []
    for program, outer, inner, divisor in [(0, 3, 7, 5), (17, 4, 9, 5), (100, 0, 9, 7), (31, 8, 40, 3), (32, 8, 80, 3)]:
        y = torch.empty(128, dtype=torch.int64, device="meta")
        launch = Launch(count, 128, dict(y=y, outer=outer, inner=inner, divisor=divisor), num_warps=1)
        code = warp.decode(gpu_model_training.sass(launch.compile_for(90).cubin))
        signature = launch.specialization()["signature"]
        arguments = list(gpu_model_training.flat(tuple(signature.values()), (y, outer, inner, divisor)))
        values = [0 if isinstance(value, torch.Tensor) else value for _, value in arguments]
        walking = Storing(code, warp.parameters([kind for kind, _ in arguments], values), program)
        instructions = walking.run().instructions
        found.append(dict(stored=walking.stored, expected=counted(program, outer, inner, divisor), count=instructions))
    return found


def compiled_sums() -> list[list[float]]:
    """Return the figures of the second stage of a gradient's sums, of 32, 64 and 320 parts, from its dry run."""
    from seemore_fast.benchmarks import gpu_dry_run
    from seemore_fast.kernels import sums
    from seemore_fast.kernels.launch import run

    with gpu_dry_run.dry_run(), gpu_dry_run.launches() as found:
        for parts in (32, 64, 320):
            gradient = torch.empty(36, 36)
            run([sums.add_parts([gradient], sums.new_partial(parts, [gradient]))], gradient.device)
    return [list(figures[1:]) for figures in gpu_model_training.predict_launches(found)]


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
    sys.exit()


# Tests


def walk(trips: int, small: tuple[int, ...] = ()) -> warp.Walked:
    words = warp.parameters(["*fp32", "i32"], [0, trips])
    return warp.Warp(warp.decode(LOOP), words, block=0, small=small).run()


def test_a_loop_takes_as_long_as_its_counter_says():
    assert [walk(trips).instructions for trips in (1, 2, 10)] == [8, 13, 53]
    assert walk(3).cycles > 3 * warp.LATENCIES["LDG"] > walk(3, small=(1,)).cycles > 3 * warp.LATENCIES["small LDG"]


def test_an_unknown_loop_is_refused():
    with pytest.raises(RuntimeError, match="the loop that ends at 0x60 depends on what is unknown"):
        warp.Warp(warp.decode(LOOP), {}, block=0).run()


def test_integers_are_those_that_a_kernel_stores():
    for found in json.loads(run_without(__file__, "compiled_counts")):
        assert found["stored"] == found["expected"] and found["count"] > 10, found


def test_launches_of_the_dry_run_are_predicted():
    rows = [gpu_model_training.Figures("add_up", *row) for row in json.loads(run_without(__file__, "compiled_sums"))]
    first, second, last = rows
    assert first.grid == second.grid == last.grid == 21 and first.rounds == 1
    assert last.instructions - second.instructions == pytest.approx(8 * (second.instructions - first.instructions))
    moved = 4 * 36 * 36
    assert [row.bytes for row in rows] == pytest.approx([1e6 * n * moved / 4.3e12 for n in (33, 65, 321)])
    for row in rows:
        assert row.us(0.6) >= row.us() >= max(row.issue / 0.8, row.latency, gpu_model_training.FLOOR_US)
    figures = gpu_model_training.summary(rows, torch_kernels=10)
    assert figures["launches"] == 3 and figures["ms"] == pytest.approx((sum(row.us() for row in rows) + 20) / 1000)
