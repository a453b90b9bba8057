"""Training runs with their steps in graphs, replayed on the host: files, resume and errors are those of eager runs."""

import pytest
import torch
from helpers import processes
from helpers.host_graphs import HostGraphs
from helpers.tables import read_csv
from helpers.training import arguments, checkpoint, newest, stopped, tensors, trainer

from seemore_fast.cli import main
from seemore_fast.errors import TrainingError
from seemore_fast.training import components

EXACT = ["optimizer.lr=0.0009765625", "schedule.name=multistep", "schedule.milestones=[4,8]", "schedule.warmup=1"]


@pytest.fixture
def graphs(monkeypatch):
    graphs = HostGraphs()
    monkeypatch.setattr(components, "graphs_for", lambda device: graphs)
    return graphs


def assert_is_eager(work, *overrides, name="run"):
    """Compare the newest checkpoint and the tables bit for bit with those of an eager run."""
    trainer(work, *EXACT, *overrides, "graph=false", out="eager").run()
    states = [newest(work, out) for out in (name, "eager")]
    assert states[0]["step"] == states[1]["step"] == 12 and states[0]["best"] == states[1]["best"]
    assert all(torch.equal(*pair) for pair in zip(*map(tensors, states), strict=True))
    for part in ("optimizer", "scaler"):
        assert list(states[0][part]) == list(states[1][part])
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    assert (work / name / "validation.csv").read_text() == (work / "eager" / "validation.csv").read_text()


@pytest.mark.parametrize(
    "overrides",
    [[], ["optimizer.clip=0.01", "optimizer.name=adamw"], ["accumulate=2", "loss.fft=0.1"], ["precision=bf16"]],
    ids=str,
)
def test_a_run_in_graphs_is_the_eager_one(work, graphs, overrides):
    assert trainer(work, *EXACT, *overrides).run()
    assert (graphs.warm_ups, len(graphs.captures)) == (3, 1)
    assert_is_eager(work, *overrides)


def test_a_resumed_run_in_graphs_is_bit_equal(work, graphs):
    assert stopped(work, *EXACT, step=7).step == 7
    assert trainer(work, *EXACT, "data.workers=1", resume="auto").run()
    assert len(graphs.captures) == 2
    assert_is_eager(work)


def run_in_graphs(line):
    """What each of two processes does."""
    components.graphs_for = lambda device: HostGraphs()
    return main(line)


def test_two_processes_in_graphs_give_the_weights_of_one(work):
    overrides = [*EXACT, "precision=fp64", "accumulate=2", "optimizer.clip=0.1", "log.every=1"]
    assert trainer(work, *overrides, out="one").run()
    line = ["train", *arguments(work, *overrides, out="two"), "--device", "cpu"]
    done = processes.run_two(run_in_graphs, line, output=work / "printed")
    assert [status for status, _ in done] == [0, 0], done
    for one, two in zip(*(tensors(newest(work, out)) for out in ("one", "two")), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    losses = [[float(row["loss"]) for row in read_csv(work / out / "steps.csv")] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_capture_that_fails_is_reported_and_the_run_goes_on(work, graphs, capsys):
    graphs.error = RuntimeError("no memory")
    assert trainer(work, *EXACT).run()
    assert capsys.readouterr().out.count("no CUDA graph for batches of shape (4, 3, 16, 16) and (4, 3, 32, 32)") == 1
    assert_is_eager(work)


def test_nan_in_a_graph_ends_the_run(work, graphs):
    stopped(work)
    running = trainer(work, resume="auto")
    running.run(until=9)  # in a graph
    with torch.no_grad():
        running.model.conv_2.bias[0] = torch.nan
    assert len(graphs.captures) == 2
    with pytest.raises(
        TrainingError, match=r"loss of step 10 is nan; the last good checkpoint is .*step_000000009\.pt"
    ):
        running.run()
    assert newest(work)["step"] == 9 and checkpoint(work, 9).exists()
