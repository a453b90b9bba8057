"""`seemore-fast benchmark training`: tiny steps of all that there are, checked and counted."""

import pytest
import torch
from helpers.benchmarks import figures

from seemore_fast.benchmarks import compare_training
from seemore_fast.cli import main


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("results"), torch.get_num_threads()
    assert main(["benchmark", "training", "--quick", "--runs", "1", "--threads", "1", "--results", str(folder)]) == 0
    torch.set_num_threads(threads)
    return figures(next(folder.glob("*/training.json")))["tiny 2x16x16"]


def test_every_step_is_right_and_timed(lines):
    assert {f"seemore-fast {kind}" for kind in ("fp32", "bf16")} <= set(lines)
    for name, line in lines.items():
        assert set(line) & {"ms", "absent"}, f"{name}: {line}"
        if "ms" in line and "fp32" in name and not name.startswith("matmul "):
            assert line["max_error"] < 1e-4


def test_what_is_kept_is_counted(lines):
    ours, eager = lines["seemore-fast fp32"], lines["reference fp32 eager"]
    assert 0 < ours["saved_mb"] < eager["saved_mb"] / 2
    assert ours["step_mb"] is None or ours["step_mb"] >= 0


def test_the_loop_is_timed_beside_its_step(work, tmp_path, capsys):
    told = ["benchmark", "loop", "--quick", "--device", "cpu", "--turns", "2", "--steps", "3"]
    assert main([*told, "--data", str(work / "photos"), "--results", str(tmp_path / "out")]) == 0
    lines = figures(next((tmp_path / "out").glob("*/loop.json")))["tiny"]
    assert set(lines) == {"seemore-fast bare step", "seemore-fast loop"} and all(
        line["runs"] == 2 for line in lines.values()
    )
    share = lines["seemore-fast bare step"]["ms"] / lines["seemore-fast loop"]["ms"]
    assert share > 0 and f"the loop has {share:.1%} of the bare step's speed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*told, "--data", str(tmp_path / "none")])
    assert "data.train: " in capsys.readouterr().err


def test_storages_count_once_and_parameters_not_at_all():
    weight, x = torch.nn.Parameter(torch.ones(1000)), torch.ones(1000)

    def step():
        y = x * weight
        (y * y.view(10, 100).flatten()).sum().backward()

    assert compare_training.saved_megabytes(step) == pytest.approx(0.008)  # x and y, 1000 floats each
