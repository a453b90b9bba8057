"""Harness of the benchmarks: checks before timing, turns, clocks and figures. No test depends on real times."""

import itertools
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers.benchmarks import scaled_sum

from seemore_fast.benchmarks import command
from seemore_fast.benchmarks.machine import grown_megabytes

CPU = torch.device("cpu")


@pytest.fixture
def case_of(harness):
    """Function from providers of 3x + gate, to which it adds eager PyTorch, to a Case with three input sets."""

    def case(providers, dtype=torch.float32, mode="forward", eager=None):
        shapes = dict.fromkeys(["x", "gate", *(["upstream"] if mode != "forward" else [])], (2, 3, 5))
        inputs = [harness.random_tensors(shapes, dtype, CPU, seed) for seed in range(3)]
        exact = harness.operator(scaled_sum, mode)
        providers = {"torch eager": eager or exact, **providers}
        return harness.operator_case(providers, inputs, exact, mode, operations=90)

    return case


@pytest.fixture
def clock(harness, monkeypatch):
    """Function that replaces measured times by given ones, in the order of the providers or by provider's call."""

    def replace(times):
        def measure(call, device, kernels_only):
            return (next(times) if hasattr(times, "__next__") else times(call)), None

        monkeypatch.setattr(harness, "measure", measure)
        monkeypatch.setattr(harness.random.Random, "sample", lambda self, names, count: names)

    return replace


# Correctness


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.02)], ids=str)
def test_a_wrong_provider_is_not_timed(harness, case_of, dtype, factor):
    wrong = harness.operator(lambda x, gate: factor * scaled_sum(x, gate))
    right = harness.operator(lambda x, gate: scaled_sum(x.float(), gate.float()).to(dtype))
    rows = harness.run_case(case_of({"seemore-fast cpu": wrong, "other": right}, dtype), CPU, runs=2)
    assert rows["seemore-fast cpu"].keys() == {"wrong"}
    assert rows["seemore-fast cpu"]["wrong"].startswith("result 0 errs by")
    assert rows["other"]["ms"] > 0 and rows["other"]["x_ours"] is None


INVALID = {
    "nan": lambda y: torch.where(y == y[0, 0, 0], torch.nan, y),
    "one more result": lambda y: (y, y),
    "smaller": lambda y: y[:, :, :4],
    "scalar": lambda y: y.mean(),
    "none": lambda y: None,
}


@pytest.mark.parametrize("invalid", INVALID.values(), ids=INVALID)
def test_invalid_results_are_wrong(harness, case_of, invalid):
    provider = harness.operator(lambda x, gate: invalid(scaled_sum(x, gate)))
    rows, calls = harness.check(case_of({"other": provider}))
    assert {"wrong", "failed"} & set(rows["other"]) and list(calls) == ["torch eager"]


@pytest.mark.parametrize("mode, wrong", [("forward", None), ("backward", "result 1"), ("both", "result 2")])
def test_a_wrong_gradient_is_found_where_the_value_is_right(harness, case_of, mode, wrong):
    def function(x, gate):  # the gradient of `gate` is 0.1% off
        return scaled_sum(x, gate) + 1e-3 * (gate - gate.detach())

    provider = harness.operator(function, mode)
    row = harness.check(case_of({"other": provider}, mode=mode))[0]["other"]
    assert row["wrong"].startswith(f"{wrong} errs by") if wrong else row.keys() == {"max_error"}


def test_integers_are_not_compared(harness, case_of):
    with_index = harness.operator(lambda x, gate: (torch.arange(3), scaled_sum(x, gate)))
    assert "max_error" in harness.check(case_of({"other": with_index}))[0]["other"]


def test_the_baseline_is_eager_in_any_layout_unless_it_is_nan(harness, case_of):
    def scaled(factor):
        return harness.operator(lambda x, gate: factor * scaled_sum(x, gate))

    rows, _ = harness.check(case_of({"other": scaled(1.015), "torch eager channels_last": scaled(1.01)}))
    assert all("max_error" in row for row in rows.values())
    rows, _ = harness.check(case_of({"other": scaled(1.015), "torch eager channels_last": scaled(torch.nan)}))
    assert [name for name, row in rows.items() if "wrong" in row] == ["other", "torch eager channels_last"]
    case = case_of({}, eager=scaled(1.001))
    assert "max_error" in harness.check(case)[0]["torch eager"]
    case.baseline = ()
    assert "errs by" in harness.check(case)[0]["torch eager"]["wrong"]


def test_failing_and_absent_providers_are_reported(harness, case_of, capsys):
    errors = {"one": RuntimeError("out of order\nand a second line"), "two": NotImplementedError()}
    providers = {name: harness.operator(Mock(side_effect=error)) for name, error in errors.items()}
    providers["three"] = "not installed"
    rows = harness.run_case(case_of(providers), CPU, runs=1)
    assert rows["one"] == {"failed": "RuntimeError: out of order"}
    assert rows["two"]["failed"].startswith("NotImplementedError")
    assert rows["three"] == {"absent": "not installed"}
    assert list(rows) == ["torch eager", *providers, "clone", "matmul fp32"]
    command.print_table("a case", rows)
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: out of order" in printed and "absent: not installed" in printed


# Turns and figures


def test_each_provider_runs_once_a_round_in_changing_order_on_changing_inputs(harness, case_of):
    names, log, runs = ["a", "b", "c"], [], 20

    def provider(name):
        def call(tensors):
            log.append((name, tensors["x"].data_ptr()))
            return scaled_sum(**tensors)

        return lambda tensors: lambda: call(tensors)

    case = case_of({name: provider(name) for name in names}, eager="left out")
    case.bytes = case.operations = None  # no limits of the machine
    harness.run_case(case, CPU, runs)
    checked, turns = log[:3], log[3:]
    assert [name for name, _ in checked] == names
    rounds = [[name for name, _ in turns[i : i + 3]] for i in range(0, len(turns), 3)]
    assert len(rounds) == harness.WARM_UP + runs
    assert all(sorted(order) == names for order in rounds)
    neighbours = list(itertools.pairwise(turns))
    assert {before + after for (before, _), (after, _) in neighbours} >= {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert all(inputs != next_inputs for (_, inputs), (_, next_inputs) in neighbours)


def test_the_median_after_the_warm_up_counts(harness, case_of, clock):
    case = case_of({"seemore-fast cpu": harness.operator(scaled_sum)}, eager="left out")
    clock(itertools.cycle([8, 4, 2]))
    rows = harness.run_case(case, CPU, runs=1)
    assert [rows[name]["ms"] for name in ("seemore-fast cpu", "clone", "matmul fp32")] == [8, 4, 2]
    assert (rows["clone"]["x_ours"], rows["matmul fp32"]["x_ours"]) == (0.5, None)
    assert case.bytes == 3 * 30 * 4  # x, gate and the result
    assert rows["seemore-fast cpu"]["gb_s"] == pytest.approx(case.bytes / 8e-3 / 1e9)
    assert rows["seemore-fast cpu"]["gflop_s"] == pytest.approx(90 / 8e-3 / 1e9)
    assert rows["seemore-fast cpu"]["of_copy"] == pytest.approx(0.5) and rows["clone"]["of_copy"] == 1

    case.bytes = case.operations = None
    clock(iter([99, 99, 99, 5, 1, 2, 3, 4]))
    row = harness.run_case(case, CPU, runs=5)["seemore-fast cpu"]
    assert (row["ms"], row["ms_min"], row["ms_max"], row["ms_quartiles"]) == (3, 1, 5, [2, 4])


def test_cases_take_turns_and_are_compared_each_with_its_own(harness, case_of, clock):
    first, second = (case_of({f"seemore-fast {name}": harness.operator(scaled_sum)}, eager="left out") for name in "ab")
    first.providers["other"] = harness.operator(scaled_sum)
    first.bytes, second.operations = None, 180
    clock(itertools.cycle([4, 12, 6, 3]))
    rows = harness.run_case([first, second], CPU, runs=1)
    timed = ["seemore-fast a", "other", "seemore-fast b", "matmul fp32"]
    assert [(rows[name]["ms"], rows[name]["x_ours"]) for name in timed] == [(4, 1), (12, 3), (6, 1), (3, None)]
    matmul = 2 * 64**3 / 3e6
    shares = [rows[name]["of_matmul"] * matmul for name in timed]
    assert shares == pytest.approx([90 / 4e6, 90 / 12e6, 180 / 6e6, matmul])

    del first.providers["other"]
    first.pixels, second.pixels = 30, 60
    clock(itertools.cycle([4, 6, 3]))
    rows = harness.run_case([first, second], CPU, runs=1)
    assert [rows[name].get("x_pixel") for name in timed if name != "other"] == [1, 0.75, None]
    assert [rows[name]["x_ours"] for name in timed if name != "other"] == [None] * 3


def test_a_provider_is_called_no_more_after_its_timeout(harness, case_of, clock, monkeypatch):
    case = case_of({"other": harness.operator(scaled_sum)})
    case.bytes = case.operations = None
    case.timeout = 25
    times = {"torch eager": itertools.repeat(10_000), "other": itertools.count(1)}
    clock(lambda call: next(times[call]))
    monkeypatch.setattr(harness, "check", lambda case: ({}, {name: [name] for name in times}))
    rows = harness.run_case(case, CPU, runs=7)
    assert [rows[name]["runs"] for name in times] == [1, 7]
    assert [rows[name]["ms"] for name in times] == [10_000, 3 + 4]


def test_a_turn_may_be_two_calls_of_which_one_counts(harness, case_of, clock, monkeypatch):
    case, called, timed = case_of({}), [], []
    case.discard_first = True
    clock(lambda call: timed.append(call()) or 1.0)
    monkeypatch.setattr(harness, "machine_limits", lambda *arguments: {})
    monkeypatch.setattr(harness, "check", lambda case: ({}, {"torch eager": [lambda: called.append(1)]}))
    assert harness.run_case(case, CPU, runs=2)["torch eager"]["runs"] == 2
    assert len(called) == 2 * len(timed) == 2 * (harness.WARM_UP + 2)


def test_shares_are_of_products_of_the_same_precision(harness, case_of, clock):
    times = {"seemore-fast bf16": 4, "seemore-fast fp32": 8, "clone": 1, "matmul bf16": 1, "matmul fp32": 2}
    case = case_of({name: harness.operator(scaled_sum) for name in list(times)[:2]}, eager="left out")
    order, dtypes = itertools.cycle(times), {}

    def time_of(call):
        name = next(order)
        if name.startswith("matmul"):
            dtypes[name] = call().dtype
        return times[name]

    clock(time_of)
    rows = harness.run_case(case, CPU, runs=1)
    assert dtypes == {"matmul bf16": torch.bfloat16, "matmul fp32": torch.float32}
    for precision in ("bf16", "fp32"):
        rate = 2 * 64**3 / times[f"matmul {precision}"]
        share = case.operations / times[f"seemore-fast {precision}"] / rate
        assert rows[f"seemore-fast {precision}"]["of_matmul"] == pytest.approx(share)


def test_bytes_count_once_except_inputs_that_two_passes_read(harness, case_of):
    images = {mode: case_of({}, mode=mode).bytes / (30 * 4) for mode in harness.MODES}
    assert images == {"forward": 2 + 1, "backward": 3 + 2, "both": 2 + 1 + 3 + 2}


def test_the_copy_moves_as_many_bytes(harness, case_of):
    case = case_of({})
    calls, traffic, _ = harness.machine_limits(case, CPU, ["fp32"])["clone"]
    assert traffic == case.bytes == 2 * calls[0]().nbytes
    assert len({call.__self__.data_ptr() for call in calls}) == len(calls) > 1


# Inputs, backends and memory


def test_input_sets_exceed_the_cache_within_bounds(harness, monkeypatch):
    monkeypatch.setattr(harness, "cpu_cache", lambda: 1000)

    def count(elements, *most):
        return len(harness.input_sets(lambda seed: {"x": torch.full((elements,), float(seed))}, CPU, *most))

    assert [count(elements) for elements in (1, 100, 250, 10000)] == [harness.MAX_SETS, 6, 3, 1]
    assert count(1, 2) == 2


def test_the_cache_is_as_reported_or_a_large_one(harness, tmp_path):
    assert harness.cpu_cache(str(tmp_path)) == harness.MIN_CACHE
    for index, size in enumerate(["32K", "1024K", "384M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert harness.cpu_cache(str(tmp_path)) == 384 * 2**20


def test_missing_modules_come_with_the_command_that_installs_them(harness, monkeypatch):
    assert harness.missing("torch") is None
    for module in ("openvino", "seemore.module"):
        monkeypatch.setitem(sys.modules, module, None)
    assert harness.missing("openvino").endswith(": pip install 'seemore-fast[bench]'")
    assert harness.missing("seemore.module").endswith("[bench]' and pip install --no-deps seemore")


def test_ours_prepares_and_runs_on_every_backend_and_instruction_set(harness, monkeypatch):
    active, seen = ["avx2"], []

    @contextmanager
    def use(name):
        active.append(name)
        yield
        active.pop()

    def provider(tensors):
        seen.append(list(active))
        return lambda: seen.append(list(active))

    native = SimpleNamespace(
        instruction_set=lambda: active[0], use_instruction_set=lambda name: active.__setitem__(0, name)
    )
    info = {"unavailable": {"triton": "not here"}, "cpu": {"instruction_sets": ["portable", "avx2"]}}
    monkeypatch.setattr(harness.seemore_fast, "backend_info", lambda: info)
    monkeypatch.setattr(harness.seemore_fast, "use_backend", use)
    monkeypatch.setattr(harness.seemore_fast.backends, "native", native)
    table = harness.ours(provider, CPU, instruction_sets=True)
    assert list(table) == ["seemore-fast cpu", "seemore-fast cpu portable", "seemore-fast cpu avx2"]
    table["seemore-fast cpu portable"]({})()
    assert seen == [["portable", "cpu"]] * 2 and active == ["avx2"]
    assert list(harness.ours(provider, CPU)) == ["seemore-fast cpu"]
    on_cuda = harness.ours(provider, torch.device("cuda"), instruction_sets=True)
    assert list(on_cuda) == ["seemore-fast cuda", "seemore-fast triton"]
    assert on_cuda["seemore-fast triton"] == "not here"
    info["unavailable"] = {"cpu": "no compiler"}
    assert harness.ours(provider, CPU, instruction_sets=True) == {"seemore-fast cpu": "no compiler"}


def test_backward_runs_alone_repeatedly_and_in_its_layout(harness):
    calls = []

    def function(x, gate):
        calls.append(x)
        return x * gate

    tensors = harness.random_tensors(dict.fromkeys(["x", "gate", "upstream"], (1, 2, 3, 4)), torch.float64, CPU, 0)
    before = dict(tensors)
    harness.operator(scaled_sum, "backward")(tensors)
    assert tensors == before
    run = harness.operator(function, "backward", torch.channels_last)(tensors)
    for dx, dgate in (run(), run()):
        torch.testing.assert_close(dx, tensors["upstream"] * tensors["gate"])
        torch.testing.assert_close(dgate, tensors["upstream"] * tensors["x"])
    assert len(calls) == 1
    assert calls[0].is_contiguous(memory_format=torch.channels_last)


def test_memory_of_a_call_is_its_growth():
    assert 40 < grown_megabytes(lambda: torch.ones(50, 2**18)) < 80  # 52 MB


# The clock of a GPU


class Gpu:
    """torch.cuda of a GPU on which each call is a millisecond of work, for a slow host; in seconds."""

    def __init__(self, monkeypatch):
        self.now, self.ends, self.slept = 0.0, 0.0, []
        for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device: 0)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
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


@pytest.mark.parametrize(
    "kernels_only, host_seconds, sleeps", [(True, 1e-5, 1), (True, 2e-3, 2), (True, 0.02, 3), (False, 2e-3, 0)]
)
def test_launches_are_timed_with_whole_calls_only(harness, monkeypatch, kernels_only, host_seconds, sleeps):
    gpu = Gpu(monkeypatch)
    milliseconds, _ = harness.measure(lambda: gpu.call(host_seconds), torch.device("cuda"), kernels_only)
    assert milliseconds == (pytest.approx(1) if kernels_only else pytest.approx(2, rel=0.2))
    assert gpu.slept == list(harness.SLEEPS[:sleeps])
