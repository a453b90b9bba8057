"""What is timed on a GPU: the kernels without the host that launches them, by a clock that a test turns."""

from types import SimpleNamespace

import pytest
import torch

from seemore_fast.benchmarks import bench_model


class Gpu:
    """torch.cuda of a GPU in which each call is a millisecond of work, for a host that takes its time; in seconds."""

    def __init__(self, monkeypatch):
        self.now = self.ends = 0.0
        self.slept, names = [], ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.slept.append(cycles)
        self.work(cycles / 2e9)

    def work(self, seconds):
        self.ends = max(self.now, self.ends) + seconds

    def call(self, host_seconds, kernels=10):
        for _ in range(kernels):
            self.now += host_seconds / kernels
            self.work(1e-3 / kernels)

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self):
            self.gpu.work(0)
            self.at = self.gpu.ends

        def query(self):
            return self.gpu.now >= self.at

        def synchronize(self):
            self.gpu.now = max(self.gpu.now, self.at)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)


@pytest.mark.parametrize("host_seconds, sleeps", [(1e-5, 1), (2e-3, 2), (0.02, 3)])
def test_what_the_host_takes_to_launch_is_not_timed(harness, monkeypatch, host_seconds, sleeps):
    gpu = Gpu(monkeypatch)
    milliseconds, _ = harness.measure(lambda: gpu.call(host_seconds), torch.device("cuda"), kernels_only=True)
    assert milliseconds == pytest.approx(1)
    assert gpu.slept == list(harness.SLEEPS[:sleeps])


def test_the_host_counts_where_the_whole_call_is_timed(harness, monkeypatch):
    gpu = Gpu(monkeypatch)
    milliseconds, _ = harness.measure(lambda: gpu.call(2e-3), torch.device("cuda"), kernels_only=False)
    assert milliseconds == pytest.approx(2, rel=0.2) and not gpu.slept


def test_a_step_has_two_sets_of_inputs_and_a_photo_as_many_as_exceed_the_cache(harness, monkeypatch):
    """Each set of a step has a graph, with all the memory of a step."""

    class Made(Exception):
        pass

    def input_sets(make, device, most=None):
        raise Made(len(sets(lambda seed: {"x": torch.zeros(1)}, device, most)))

    sets, counts = harness.input_sets, {}
    monkeypatch.setattr(harness, "input_sets", input_sets)
    for title, setting in bench_model.CASES["quick"].items():
        with pytest.raises(Made) as made:
            bench_model.build(setting, torch.device("cpu"), SimpleNamespace(compile=False))
        counts[title.split()[0]] = made.value.args[0]
    assert counts == {"inference": harness.MAX_SETS, "training": 2}
