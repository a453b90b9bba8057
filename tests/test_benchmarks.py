"""The benchmarks check before they time, take turns and write; what they time is none of a test's business."""

import itertools
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers.benchmarks import scaled_sum

from seemore_fast.benchmarks import command

CPU = torch.device("cpu")


@pytest.fixture
def case_of(harness):
    """Function from providers of 3x + gate, to which it adds eager PyTorch, to a Case with three input sets."""

    def case(providers, dtype=torch.float32, mode="forward"):
        shapes = dict.fromkeys(["x", "gate", *(["upstream"] if mode != "forward" else [])], (2, 3, 5))
        inputs = [harness.random_tensors(shapes, dtype, CPU, seed) for seed in range(3)]
        providers = {"torch eager": harness.operator(scaled_sum, mode), **providers}
        return harness.operator_case(providers, inputs, scaled_sum, mode, operations=90)

    return case


class WrongGradient(torch.autograd.Function):
    """The right value, and a gradient of `gate` that is 0.1% off."""

    @staticmethod
    def forward(context, x, gate):
        return scaled_sum(x, gate)

    @staticmethod
    def backward(context, upstream):
        return 3 * upstream, 1.001 * upstream


def out_of_order(x, gate):
    raise RuntimeError("out of order\nand a second line")


def without_a_word(x, gate):
    raise NotImplementedError


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.02)], ids=str)
def test_a_wrong_provider_is_not_timed(harness, case_of, dtype, factor):
    wrong = harness.operator(lambda x, gate: factor * scaled_sum(x, gate))
    right = harness.operator(lambda x, gate: scaled_sum(x.float(), gate.float()).to(dtype))
    lines = harness.run_case(case_of({"seemore-fast cpu": wrong, "other": right}, dtype), CPU, runs=2)
    assert lines["seemore-fast cpu"].keys() == {"wrong"}
    assert lines["seemore-fast cpu"]["wrong"].startswith("result 0 errs by")
    assert lines["other"]["ms"] > 0
    assert lines["other"]["x_ours"] is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x, gate: torch.where(x == x[0, 0, 0], torch.nan, scaled_sum(x, gate)),
        lambda x, gate: (scaled_sum(x, gate), x),
        lambda x, gate: scaled_sum(x, gate)[:, :, :4],
        lambda x, gate: scaled_sum(x, gate).mean(),
        lambda x, gate: None,
    ],
    ids=["nan", "one_more_result", "smaller", "scalar", "none"],
)
def test_nor_is_one_with_strange_results(harness, case_of, function):
    lines, calls = harness.check(case_of({"other": harness.operator(function)}))
    assert {"wrong", "failed"} & set(lines["other"])
    assert list(calls) == ["torch eager"]


def test_a_wrong_gradient_is_found_where_the_value_is_right(harness, case_of):
    def line(mode):
        provider = harness.operator(lambda x, gate: WrongGradient.apply(x, gate), mode)
        return harness.check(case_of({"other": provider}, mode=mode))[0]["other"]

    assert line("forward").keys() == {"max_error"}
    assert line("backward")["wrong"].startswith("result 1 errs by")
    assert line("both")["wrong"].startswith("result 2 errs by")


def test_integers_are_not_compared(harness, case_of):
    with_index = harness.operator(lambda x, gate: (torch.arange(3), scaled_sum(x, gate)))
    assert "max_error" in harness.check(case_of({"other": with_index}))[0]["other"]


def test_bytes_count_once_but_inputs_that_two_passes_read(harness, case_of):
    images = {mode: case_of({}, mode=mode).bytes / (30 * 4) for mode in harness.MODES}
    assert images == {"forward": 2 + 1, "backward": 3 + 2, "both": 2 + 1 + 3 + 2}


def test_the_copy_moves_as_many_bytes_and_is_the_measure(harness, case_of, monkeypatch):
    case = case_of({})
    calls, traffic, _ = harness.floors(case, CPU, ["fp32"])["clone"]
    assert traffic == case.bytes == 2 * calls[0]().nbytes
    assert len({call.__self__.data_ptr() for call in calls}) == len(calls) > 1
    monkeypatch.setattr(harness, "measure", lambda call, device, kernels_only: (times[call], None))
    times = {"torch eager": 4, **{call: 3 for call in calls}}
    monkeypatch.setattr(harness, "check", lambda case: ({}, {"torch eager": ["torch eager"]}))
    monkeypatch.setattr(harness, "floors", lambda case, device, kinds: {"clone": (calls, traffic, None)})
    lines = harness.run_case(case, CPU, runs=1)
    assert [lines[name]["of_copy"] for name in ("torch eager", "clone")] == [0.75, 1]


def test_eager_in_any_layout_is_the_yardstick_unless_it_is_nan(harness, case_of):
    rough = harness.operator(lambda x, gate: 1.01 * scaled_sum(x, gate))
    rougher = harness.operator(lambda x, gate: 1.015 * scaled_sum(x, gate))
    nan = harness.operator(lambda x, gate: torch.nan * x)
    lines, _ = harness.check(case_of({"other": rougher, "torch eager channels_last": rough}))
    assert all("max_error" in line for line in lines.values())
    lines, _ = harness.check(case_of({"other": rougher, "torch eager channels_last": nan}))
    assert [name for name, line in lines.items() if "wrong" in line] == ["other", "torch eager channels_last"]


def test_failing_and_absent_providers_are_reported(harness, case_of, capsys):
    providers = {
        "one": harness.operator(out_of_order),
        "two": harness.operator(without_a_word),
        "three": "not installed",
    }
    lines = harness.run_case(case_of(providers), CPU, runs=1)
    assert lines["one"] == {"failed": "RuntimeError: out of order"}
    assert lines["two"]["failed"].startswith("NotImplementedError")
    assert lines["three"] == {"absent": "not installed"}
    assert list(lines) == ["torch eager", *providers, "clone", "matmul fp32"]
    command.print_table("a case", lines)
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: out of order" in printed
    assert "absent: not installed" in printed


def test_everyone_runs_once_a_round_in_changing_order_on_changing_inputs(harness, case_of):
    names, log, runs = ["a", "b", "c"], [], 20

    def provider(name):
        def call(tensors):
            log.append((name, tensors["x"].data_ptr()))
            return scaled_sum(**tensors)

        return lambda tensors: lambda: call(tensors)

    case = case_of({name: provider(name) for name in names})
    case.bytes = case.operations = None  # no floors
    case.providers["torch eager"] = "left out"
    harness.run_case(case, CPU, runs)
    checked, turns = log[:3], log[3:]
    assert [name for name, _ in checked] == names
    rounds = [[name for name, _ in turns[i : i + 3]] for i in range(0, len(turns), 3)]
    assert len(rounds) == harness.WARM_UP + runs
    assert all(sorted(order) == names for order in rounds)
    neighbours = list(itertools.pairwise(turns))
    assert {before + after for (before, _), (after, _) in neighbours} >= {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert all(inputs != next_inputs for (_, inputs), (_, next_inputs) in neighbours)


def test_the_median_after_the_warm_up_counts(harness, case_of, monkeypatch):
    case = case_of({"seemore-fast cpu": harness.operator(scaled_sum)})
    case.providers["torch eager"] = "left out"
    times = itertools.cycle([8, 4, 2])
    monkeypatch.setattr(harness, "measure", lambda call, device, kernels_only: (next(times), None))
    monkeypatch.setattr(harness.random.Random, "sample", lambda self, names, count: names)
    monkeypatch.setattr(harness, "WARM_UP", 3)
    lines = harness.run_case(case, CPU, runs=1)
    assert [lines[name]["ms"] for name in ("seemore-fast cpu", "clone", "matmul fp32")] == [8, 4, 2]
    assert (lines["clone"]["x_ours"], lines["matmul fp32"]["x_ours"]) == (0.5, None)
    assert case.bytes == 3 * 30 * 4  # x, gate and the result
    assert lines["seemore-fast cpu"]["gb_s"] == pytest.approx(case.bytes / 8e-3 / 1e9)
    assert lines["seemore-fast cpu"]["gflop_s"] == pytest.approx(90 / 8e-3 / 1e9)

    case.bytes = case.operations = None
    times = iter([99, 99, 99, 5, 1, 2, 3, 4])
    line = harness.run_case(case, CPU, runs=5)["seemore-fast cpu"]
    assert (line["ms"], line["ms_min"], line["ms_max"], line["ms_quartiles"]) == (3, 1, 5, [2, 4])


def test_cases_take_turns_and_are_compared_each_with_its_own(harness, case_of, monkeypatch):
    first, second = (case_of({f"seemore-fast {name}": harness.operator(scaled_sum)}) for name in "ab")
    first.providers["other"] = harness.operator(scaled_sum)
    first.bytes = None
    for case in (first, second):
        case.providers["torch eager"] = "left out"
    second.operations = 180
    times = itertools.cycle([4, 12, 6, 3])
    monkeypatch.setattr(harness, "measure", lambda call, device, kernels_only: (next(times), None))
    monkeypatch.setattr(harness.random.Random, "sample", lambda self, names, count: names)
    lines = harness.run_case([first, second], CPU, runs=1)
    timed = ["seemore-fast a", "other", "seemore-fast b", "matmul fp32"]
    assert [(lines[name]["ms"], lines[name]["x_ours"]) for name in timed] == [(4, 1), (12, 3), (6, 1), (3, None)]
    matmul = 2 * 64**3 / 3e6
    shares = [lines[name]["of_matmul"] * matmul for name in timed]
    assert shares == pytest.approx([90 / 4e6, 90 / 12e6, 180 / 6e6, matmul])

    del first.providers["other"]
    first.pixels, second.pixels, times = 30, 60, itertools.cycle([4, 6, 3])
    lines = harness.run_case([first, second], CPU, runs=1)
    assert [lines[name].get("x_pixel") for name in timed if name != "other"] == [1, 0.75, None]
    assert [lines[name]["x_ours"] for name in timed if name != "other"] == [None] * 3


def test_patience_ends(harness, case_of, monkeypatch):
    case = case_of({"other": harness.operator(scaled_sum)})
    case.bytes = case.operations = None
    case.patience = 25
    times = {"torch eager": itertools.repeat(10_000), "other": itertools.count(1)}
    monkeypatch.setattr(harness, "measure", lambda call, device, kernels_only: (next(times[call]), None))
    monkeypatch.setattr(harness, "check", lambda case: ({}, {name: [name] for name in times}))
    lines = harness.run_case(case, CPU, runs=7)
    assert [lines[name]["runs"] for name in times] == [1, 7]
    assert [lines[name]["ms"] for name in times] == [10_000, 3 + 4]


def test_a_turn_may_be_two_calls_of_which_one_counts(harness, case_of, monkeypatch):
    case, called, timed = case_of({}), [], []
    case.first_is_lost = True
    monkeypatch.setattr(harness, "floors", lambda *arguments: {})
    monkeypatch.setattr(harness, "check", lambda case: ({}, {"torch eager": [lambda: called.append(1)]}))
    monkeypatch.setattr(harness, "measure", lambda call, device, kernels_only: (timed.append(call()) or 1.0, None))
    assert harness.run_case(case, CPU, runs=2)["torch eager"]["runs"] == 2
    assert len(called) == 2 * len(timed) == 2 * (harness.WARM_UP + 2)


def test_without_a_yardstick_only_the_tolerance_counts(harness, case_of):
    case = case_of({"torch eager": harness.operator(lambda x, gate: 1.001 * scaled_sum(x, gate))})
    assert "max_error" in harness.check(case)[0]["torch eager"]
    case.yardstick = ()
    assert "errs by" in harness.check(case)[0]["torch eager"]["wrong"]


def test_what_is_missing_comes_with_the_command_that_installs_it(harness, monkeypatch):
    assert harness.missing("torch") is None
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "seemore.module", None)
    assert harness.missing("openvino").endswith(": pip install 'seemore-fast[bench]'")
    assert harness.published().endswith(": pip install 'seemore-fast[bench]' and pip install --no-deps seemore")


def test_input_sets_exceed_the_cache_within_bounds(harness, monkeypatch):
    monkeypatch.setattr(harness, "cpu_cache", lambda: 1000)

    def count(elements):
        return len(harness.input_sets(lambda seed: {"x": torch.full((elements,), float(seed))}, CPU))

    assert [count(elements) for elements in (1, 100, 250, 10000)] == [harness.MAX_SETS, 6, 3, 1]


def test_the_cache_is_what_the_system_tells_or_a_large_one(harness, tmp_path):
    assert harness.cpu_cache(str(tmp_path)) == harness.LEAST_CACHE
    for index, size in enumerate(["32K", "1024K", "384M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert harness.cpu_cache(str(tmp_path)) == 384 * 2**20


def test_shares_are_of_products_of_the_same_kind(harness, case_of, monkeypatch):
    case = case_of(
        {"seemore-fast bf16": harness.operator(scaled_sum), "seemore-fast fp32": harness.operator(scaled_sum)}
    )
    case.providers["torch eager"] = "left out"
    times = {"seemore-fast bf16": 4, "seemore-fast fp32": 8, "matmul bf16": 1, "matmul fp32": 2}
    dtypes = {}

    def measure(call, device, kernels_only):
        name = next(order)
        if name.startswith("matmul"):
            dtypes[name] = call().dtype
        return times.get(name, 1), None

    order = itertools.cycle([*list(case.providers)[1:], "clone", "matmul bf16", "matmul fp32"])
    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness.random.Random, "sample", lambda self, names, count: names)
    lines = harness.run_case(case, CPU, runs=1)
    assert dtypes == {"matmul bf16": torch.bfloat16, "matmul fp32": torch.float32}
    rate = {kind: 2 * 64**3 / times[f"matmul {kind}"] for kind in ("bf16", "fp32")}
    for kind in rate:
        share = case.operations / times[f"seemore-fast {kind}"] / rate[kind]
        assert lines[f"seemore-fast {kind}"]["of_matmul"] == pytest.approx(share)


def test_ours_prepares_and_runs_on_every_backend_and_instruction_set(harness, monkeypatch):
    current, seen = [], []

    @contextmanager
    def use(name):
        current.append(name)
        yield
        current.pop()

    def provider(tensors):
        seen.append([*current, native.chosen])
        return lambda: seen.append([*current, native.chosen])

    class native:
        chosen = "avx2"

        def instruction_set():
            return native.chosen

        def use_instruction_set(name):
            native.chosen = name

    info = {
        "available": ["reference", "cpu", "cuda"],
        "unavailable": {"triton": "not here"},
        "cpu": {"instruction_sets": ["portable", "avx2"]},
    }
    monkeypatch.setattr(harness.seemore_fast, "backend_info", lambda: info)
    monkeypatch.setattr(harness.seemore_fast, "use_backend", use)
    monkeypatch.setattr(harness.seemore_fast, "native", native, raising=False)
    table = harness.ours(provider, CPU, instruction_sets=True)
    assert list(table) == ["seemore-fast cpu", "seemore-fast cpu portable", "seemore-fast cpu avx2"]
    table["seemore-fast cpu portable"]({})()
    assert seen == [["cpu", "portable"]] * 2
    assert (current, native.chosen) == ([], "avx2")
    assert list(harness.ours(provider, CPU)) == ["seemore-fast cpu"]
    on_cuda = harness.ours(provider, torch.device("cuda"), instruction_sets=True)
    assert list(on_cuda) == ["seemore-fast cuda", "seemore-fast triton"]
    assert on_cuda["seemore-fast triton"] == "not here"
    info |= {"available": ["reference"], "unavailable": {"cpu": "no compiler"}}
    assert harness.ours(provider, CPU, instruction_sets=True) == {"seemore-fast cpu": "no compiler"}


def test_backward_runs_alone_more_than_once_and_in_its_layout(harness):
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
