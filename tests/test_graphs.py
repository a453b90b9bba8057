"""Which calls are captured, kept, dropped and done without; with a capture that needs no GPU. Replays: test_gpu.py."""

import threading
import warnings

import pytest
import torch

from seemore_fast import use_backend
from seemore_fast.network.graphs import Graphs


class Recorder:
    """Stands for a captured call; notes for which sizes it was made and called."""

    def __init__(self, fails=()):
        self.captured, self.replayed, self.eager, self.fails = [], [], [], fails

    def capture(self, function, x):
        if tuple(x.shape) in self.fails:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 3 TiB\nand more")
        self.captured.append(tuple(x.shape))

        def replay(x):
            self.replayed.append(tuple(x.shape))
            return 2 * x

        return replay

    def run(self, x):
        self.eager.append(tuple(x.shape))
        return 2 * x


def graphs(most=2, **options):
    recorder = Recorder(**options)
    return recorder, Graphs(recorder.run, most, recorder.capture)


def image(side, **options):
    return torch.rand(1, 3, side, side, **options)


def test_a_size_is_captured_when_it_comes_again():
    recorder, call = graphs()
    x = image(4)
    for _ in range(3):
        assert torch.equal(call(x), 2 * x)
    assert (recorder.eager, recorder.captured) == ([x.shape], [x.shape])
    assert recorder.replayed == [x.shape, x.shape]
    call(image(5))
    assert len(recorder.captured) == 1


def test_the_graph_not_used_for_longest_makes_room():
    recorder, call = graphs(most=2)
    for side in (4, 4, 5, 5, 4, 6, 6):  # 5 goes
        call(image(side))
    assert [size[-1] for size in recorder.captured] == [4, 5, 6]
    assert len(call) == 2
    call(image(4))
    assert recorder.replayed[-1][-1] == 4
    call(image(5)), call(image(5))
    assert recorder.captured[-1][-1] == 5 and len(call) == 2


def test_what_cannot_be_captured_runs_without_and_says_so_once():
    recorder, call = graphs(fails=[(1, 3, 4, 4)])
    x = image(4)
    call(x)
    with pytest.warns(
        UserWarning, match=r"\(1, 3, 4, 4\), calls go on without: out of memory: tried to allocate 3 TiB$"
    ):
        assert torch.equal(call(x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(x), 2 * x)
    assert len(recorder.eager) == 3 and len(call) == 0
    call(image(5)), call(image(5))
    assert len(call) == 1


def test_all_that_chooses_kernels_has_graphs_of_its_own():
    recorder, call = graphs(most=9)
    wide, narrow = image(4), image(4).half()

    def everything():
        call(wide), call(narrow)
        with torch.autocast("cpu", torch.bfloat16):
            call(wide)
        with use_backend("reference"):
            call(wide)

    everything()
    assert not recorder.captured
    everything()
    assert len(recorder.captured) == len(call) == 4


def test_sizes_that_came_once_are_forgotten(monkeypatch):
    monkeypatch.setattr("seemore_fast.network.graphs.MOST_SEEN", 3)
    recorder, call = graphs()
    for side in (4, 5, 6, 7, 4):
        call(image(side))
    assert not recorder.captured
    call(image(4))
    assert recorder.captured == [(1, 3, 4, 4)]


def test_threads_take_turns():
    inside, most = [], []

    def slow(x):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return x

    call = Graphs(slow)
    threads = [threading.Thread(target=call, args=(image(4 + i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 8
