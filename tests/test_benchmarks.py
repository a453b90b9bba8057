"""The benchmarks run; what they time is none of a test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_bench_model_checks_times_and_writes(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/bench_model.py", "--device", "cpu", "--quick", "--runs", "2"]
    done = subprocess.run(
        [*map(str, command), "--results", str(tmp_path)], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(next(tmp_path.glob("*/model.json")).read_text())
    for case in facts["cases"].values():
        assert case["seemore-fast"]["ms"] > 0
        assert case["seemore-fast"]["max_error"] < 1e-5
        assert set(case["published eager"]) & {"ms", "absent"}
    assert facts["commit"]


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    command = [sys.executable, str(ROOT / "benchmarks/bench_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr
    assert "Traceback" not in done.stderr
