"""Training runs with their steps in graphs, replayed on the host: files, resume and errors are those of eager runs."""

import pytest
import torch
from helpers.host_graphs import HostGraphs
from helpers.training import checkpoint, newest, stopped, tensors, trainer

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
