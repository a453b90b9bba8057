"""The prediction of the GPU engine's time: instructions counted in compiled code, blocks, and bytes."""

import json
import sys

import pytest

from seemore_fast.benchmarks import gpu_model, gpu_model_training

# Of a walk with two loops inside of it, of which the second is in the first; at the end, code that is jumped to.
SASS = """
        /*0000*/                   MOV R1, R2 ;           /* 0x0 */
        /*0010*/                   LDG.E R3, [R4] ;       /* 0x0 */
        /*0020*/                   FADD R1, R1, R3 ;      /* 0x0 */
        /*0030*/                   FMUL R1, R1, R3 ;      /* 0x0 */
        /*0040*/               @P1 BRA 0x30 ;             /* 0x0 */
        /*0050*/              @!P0 BRA 0x20 ;             /* 0x0 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P2 BRA 0x10 ;             /* 0x0 */
        /*0080*/                   EXIT ;                 /* 0x0 */
        /*0090*/                   FADD R1, R1, R1 ;      /* 0x0 */
        /*00a0*/                   BRA 0x60 ;             /* 0x0 */
"""


def test_instructions_are_those_of_loops_times_their_trips():
    code = gpu_model.parse(SASS)
    assert code == (8, [(1, 7), (2, 5), (3, 4)], [6])
    outer, inner = 2, 2  # instructions beside the loop inside of it, and of that
    assert gpu_model.instructions(code, steps=1, trips=[1, 1]) == 8
    assert gpu_model.instructions(code, steps=3, trips=[5, 7]) == 1 + 3 * (3 + 5 * outer + 5 * 7 * inner)


def test_loops_that_are_not_as_expected_are_refused():
    with pytest.raises(ValueError, match="2 loops inside of the walk, expected 1"):
        gpu_model.instructions(gpu_model.parse(SASS), 1, [1])


@pytest.mark.skipif(not gpu_model.LIBRARY.exists(), reason="no CUDA library")
def test_every_launch_of_the_presets_is_predicted(monkeypatch, capsys):
    pytest.importorskip("triton", reason="it brings cuobjdump")
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--json"])
    step = {gpu_model_training.CASE: {"ms": 1.0}}  # predicted in tests/test_gpu_model_training.py
    monkeypatch.setattr(gpu_model_training, "predictions", lambda to_print: step)
    gpu_model.main()
    found = json.loads(capsys.readouterr().out)
    assert found.pop(gpu_model_training.CASE) == {"ms": 1.0}
    assert len(found) == sum(map(len, gpu_model.SIZES.values()))
    for figures in found.values():
        assert figures.keys() == {"ms", "ms_at_0.6", "launches", "mb_per_group"}
        assert 0 < figures["ms"] < figures["ms_at_0.6"]
    small, large = (found[f"T x4 {size} bf16"] for size in ("480x640", "720x1280"))
    assert small["launches"] == 38
    assert 2 < large["ms"] / small["ms"] < 3.5 and large["mb_per_group"] / small["mb_per_group"] == pytest.approx(3)
