"""Shared measurement: correctness checks before any timing, interleaved runs, machine limits and clocks.

A provider is a function from one input set (tensors by name) to the call to time. What it does before it returns, such
as a change of layout or building an autograd graph, is not timed. A string in its place is why a provider is absent.
"""

import ctypes
import importlib
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import seemore_fast

OURS = "seemore-fast"
IN_A_GRAPH = ", in a graph"
BACKEND_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # the device type on which each one is timed
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COPY, MATMUL = "clone", "matmul "  # names of the machine's limits; the second one is followed by a precision
MIN_CACHE = 64 * 2**20  # bytes, for a CPU that does not report its cache
WARM_UP, MAX_SETS = 3, 32
SLEEPS = 10**6, 8 * 10**6, 64 * 10**6  # GPU cycles: half a millisecond to a thirtieth of a second
MODES = ("forward", "backward", "both")

InputSet = dict[str, Tensor]
Provider = Callable[[InputSet], Callable[[], object]]


@dataclass
class Case:
    """One table: providers, their inputs and the expected results.

    The allowed error of a result is `atol` plus 2x the error of eager PyTorch in the same dtype, all relative to the
    largest expected value. Names of eager providers begin with `baseline`; the largest of their errors counts. Without
    a baseline, `()`, `atol` alone is allowed. A list of tensors within `expected`, such as a network's gradients, is
    one result. `bytes` counts each tensor once.
    """

    providers: dict[str, Provider | str]
    inputs: list[InputSet]
    expected: list[Tensor | list[Tensor]]
    baseline: str | tuple[()]
    atol: float
    bytes: int | None = None
    operations: int | None = None
    pixels: int | None = None  # of the input, for tables of time per pixel
    images: int | None = None  # per call, for tables of images per second
    kernels_only: bool = True  # leave out the host's launches on CUDA, and fresh pages on the CPU
    pause: float = 0  # seconds between calls, until other runtimes' threads stop spinning
    discard_first: bool = False  # time the second of two calls: memory freed by other providers does not matter
    precision: str | None = None  # "bf16", for example, if neither names nor inputs show it
    timeout: float = math.inf  # seconds for all calls of one provider, which is then called no more
    figures: dict[str, dict] = field(default_factory=dict)  # more figures by provider, filled when they are prepared


def operator(
    function: Callable,
    mode: str = "forward",
    layout: torch.memory_format | None = None,
    parameters: Iterable[Tensor] = (),
) -> Provider:
    """Return a provider of a function's forward, of its backward alone, or of both in one call.

    For a backward, input sets have "upstream...", the gradient of each floating-point result in order. Gradients are
    those of the inputs and of `parameters`.
    """

    def prepare(tensors: InputSet) -> Callable:
        if layout:
            tensors = {key: t.contiguous(memory_format=layout) if t.dim() == 4 else t for key, t in tensors.items()}
        if mode == "forward":
            return torch.no_grad()(partial(function, **tensors))
        tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
        upstream = [tensors.pop(name).detach() for name in list(tensors) if name.startswith("upstream")]
        leaves = [*(t for t in tensors.values() if t.requires_grad), *parameters]

        def both() -> list[Tensor]:
            y = as_list(function(**tensors))
            return [*y, *torch.autograd.grad(y, leaves, upstream)]

        if mode == "both":
            return both
        y = as_list(function(**tensors))
        return partial(torch.autograd.grad, y, leaves, upstream, retain_graph=True)

    return prepare


def inside(context: Callable, provider: Provider) -> Provider:
    """Return a provider that prepares and runs inside `context()`."""

    def run(function: Callable, *arguments):
        with context():
            return function(*arguments)

    return lambda tensors: partial(run, run(provider, tensors))


def in_a_graph(provider: Provider) -> Provider:
    """Return a provider whose call replays a CUDA graph of the given one's call."""

    def prepare(tensors: InputSet) -> Callable:
        call, stream = provider(tensors), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # loads kernels, which is not allowed during a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

        def replay() -> object:
            graph.replay()
            return results

        return replay

    return prepare


def ours(provider: Provider, device: torch.device, instruction_sets: bool = False) -> dict[str, Provider | str]:
    """Return `provider` on each backend for `device` and, on request, on each of the CPU's instruction sets."""
    info, table = seemore_fast.backend_info(), {}
    for backend in (name for name, kind in BACKEND_DEVICES.items() if kind == device.type):
        on_backend = inside(partial(seemore_fast.use_backend, backend), provider)
        table[f"{OURS} {backend}"] = info["unavailable"].get(backend, on_backend)
    if instruction_sets and callable(table.get(f"{OURS} cpu")):
        for name in info["cpu"].get("instruction_sets", []):
            table[f"{OURS} cpu {name}"] = inside(partial(instruction_set, name), table[f"{OURS} cpu"])
    return table


@contextmanager
def setting(get: Callable, set_to: Callable, value: object):
    """Have a setting at a value within a `with` block."""
    before = get()
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def instruction_set(name: str):
    """Return a context that uses one of the CPU library's instruction sets."""
    native = seemore_fast.backends.native
    return setting(native.instruction_set, native.use_instruction_set, name)


def missing(module: str) -> str | None:
    """Return None for a module that can be imported, otherwise the error and the command that installs it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        more = " and pip install --no-deps seemore" if module.startswith("seemore") else ""
        return f"{error}: pip install 'seemore-fast[bench]'{more}"


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int) -> InputSet:
    """Return normal tensors; weights are scaled so that results are near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    scale = {name: math.prod(shape[1:]) ** -0.5 if name.startswith("weight") else 1 for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    return {name: (scale[name] * t).to(dtype) for name, t in tensors.items()}


def input_sets(make: Callable[[int], InputSet], device: torch.device, most: int = MAX_SETS) -> list[InputSet]:
    """Return make(0), make(1), ..., together more than 2x the last-level cache: no input is cached when reused."""
    first = make(0)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else cpu_cache()
    count = min(2 * cache // sum(t.nbytes for t in first.values()) + 1, most)
    return [first, *map(make, range(1, count))]


def cpu_cache(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Return the size of the CPU's last-level cache as Linux reports it, at least MIN_CACHE."""
    units, largest = {"K": 2**10, "M": 2**20, "G": 2**30}, MIN_CACHE
    for file in Path(folder).glob("index*/size"):
        text = file.read_text().strip()
        largest = max(largest, int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return largest


# Correctness


def operator_case(
    providers: dict,
    inputs: list[InputSet],
    exact: Provider,
    mode: str,
    operations: int,
    traffic: int | None = None,
    parameters: int = 0,
) -> Case:
    """Return the Case of one operator, whose baseline is "torch eager"; `exact` runs in float64.

    Without `traffic` in bytes, every input, result and parameter counts once; `parameters` are the bytes of those that
    are not inputs. With mode "both", forward and backward each read inputs and parameters.
    """
    wide = {name: t.double().contiguous() if t.is_floating_point() else t for name, t in inputs[0].items()}
    expected = as_list(exact(wide)())
    dtype = next(iter(inputs[0].values())).dtype
    if traffic is None:
        passes = 2 if mode == "both" else 1
        traffic = passes * parameters
        traffic += sum(t.nbytes * (1 if name.startswith("upstream") else passes) for name, t in inputs[0].items())
        traffic += sum(t.numel() for t in expected) * dtype.itemsize
    atol = max(torch.finfo(dtype).eps / 2, 1e-6)  # half a rounding step; in float32, another order of summation
    return Case(providers, inputs, expected, "torch eager", atol, traffic, operations)


def as_list(results: object) -> list:
    """Return results as a list without integers: a router's choice is checked by its probabilities."""
    results = [results] if isinstance(results, Tensor) else list(results)
    return [r for r in results if not isinstance(r, Tensor) or r.is_floating_point()]


def deviation(actual: Tensor | list[Tensor], exact: Tensor | list[Tensor]) -> float:
    """Return the largest difference, relative to the largest exact value."""
    actual, exact = (torch.cat([t.double().flatten() for t in as_list(tensors)]) for tensors in (actual, exact))
    return (actual - exact).abs().max().item() / (exact.abs().max().item() or 1)


def check(case: Case) -> tuple[dict[str, dict], dict[str, list[Callable]]]:
    """Return every provider's row of figures and, for correct ones, the calls, one per input set."""
    rows, calls, allowed = {}, {}, [case.atol] * len(case.expected)
    for name, provider in sorted(case.providers.items(), key=lambda item: not item[0].startswith(case.baseline)):
        if isinstance(provider, str):
            rows[name] = {"absent": provider}
            continue
        try:
            ready = [provider(tensors) for tensors in case.inputs]
            errors = [deviation(*pair) for pair in zip(as_list(ready[0]()), case.expected, strict=True)]
        except Exception as failure:  # reported as a result: the other providers are still timed
            rows[name] = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
            continue
        if name.startswith(case.baseline) and all(map(math.isfinite, errors)):
            allowed = [max(limit, case.atol + 2 * error) for limit, error in zip(allowed, errors, strict=True)]
        # `not e <=` rather than `e >`: NaN is wrong, too
        wrong = [f"result {i} errs by {e:.1e} > {allowed[i]:.1e}" for i, e in enumerate(errors) if not e <= allowed[i]]
        rows[name] = {"wrong": "; ".join(wrong)} if wrong else {"max_error": max(errors)}
        calls |= {} if wrong else {name: ready}
    return {name: rows[name] for name in case.providers}, calls


# Timing


def keep_memory():
    """Make glibc keep freed memory: results on fresh pages, which only some calls get, can take 5x as long."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_case(cases: Case | list[Case], device: torch.device, runs: int) -> dict[str, dict]:
    """Return every provider's row of figures: checked, then timed in turns; the median of `runs` counts.

    Several cases are timed together, each with providers, inputs, expected results and tolerance of its own.
    """
    cases = [cases] if isinstance(cases, Case) else cases
    first = cases[0]
    if first.kernels_only:
        keep_memory()
        functorch_config.donated_buffer = False  # lets a compiled backward run more than once on a graph
    rows, calls, case_of = {}, {}, {}
    for case in cases:
        checked, ready = check(case)
        rows, calls, case_of = rows | checked, calls | ready, case_of | dict.fromkeys(ready, case)
    precisions = {precision_of(name, case) for case in cases for name in case.providers}
    limits = machine_limits(first, device, precisions)
    times, peaks = take_turns(calls | {name: ready for name, (ready, *_) in limits.items()}, first, device, runs)
    best = {}  # of ours, by case
    for name, case in case_of.items():
        if name.startswith(OURS) and not name.endswith(IN_A_GRAPH):  # the others run without a graph
            best[id(case)] = min(statistics.median(times[name]), best.get(id(case), math.inf))
    for name, values in times.items():
        ms, case, is_limit = statistics.median(values), case_of.get(name, first), name in limits
        traffic, operations = limits[name][1:] if is_limit else (case.bytes, case.operations)
        is_comparable = id(case) in best and not case.pixels and not name.startswith(MATMUL)
        row = summary(values) | {"x_ours": ms / best[id(case)] if is_comparable else None}
        row |= {"gb_s": traffic and traffic / ms / 1e6, "gflop_s": operations and operations / ms / 1e6}
        row |= {"images_s": 1000 * case.images / ms if case.images and not is_limit else None}
        row |= {"ns_pixel": ms / case.pixels * 1e6 if case.pixels and not is_limit else None}
        rows[name] = rows.get(name, {}) | row | {"peak_mb": peaks[name]} | case.figures.get(name, {})
    add_shares(rows, lambda name: precision_of(name, case_of.get(name, first)))
    return rows


def take_turns(
    calls: dict[str, list[Callable]], case: Case, device: torch.device, runs: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Return each name's milliseconds after the warm-up and its peak memory.

    Every round has an order of its own, so that no provider always follows the same one; inputs change at every turn.
    """
    times, peaks, shuffled = {name: [] for name in calls}, {}, random.Random(0)
    turns = [name for _ in range(WARM_UP + runs) for name in shuffled.sample(list(calls), len(calls))]
    for turn, name in enumerate(turns):
        if sum(times[name]) * (1 + case.discard_first) > 1000 * case.timeout:
            continue
        time.sleep(case.pause)
        call = calls[name][turn % len(calls[name])]
        if case.discard_first:
            call()
        milliseconds, peaks[name] = measure(call, device, case.kernels_only)
        times[name].append(milliseconds)
    return {name: values[WARM_UP:] or values[-1:] for name, values in times.items()}, peaks


def precision_of(name: str, case: Case) -> str:
    """Return a provider's precision, "fp32" for example: from its name, its case or its inputs."""
    named = [precision for precision in SHORT.values() if precision in name.split()]
    return named[0] if named else case.precision or SHORT.get(next(iter(case.inputs[0].values())).dtype, "fp32")


def machine_limits(case: Case, device: torch.device, precisions: Iterable[str]) -> dict[str, tuple]:
    """Return (calls, bytes, operations) by name of what shows the machine's speed during the same minutes.

    A copy moves the bytes of the case, half read and half written, from sources that exceed the cache as the inputs do.
    Matrices are multiplied in each precision.
    """
    found = {}
    if case.bytes:
        dtype = next(iter(case.inputs[0].values())).dtype
        count = max(case.bytes // 2 // dtype.itemsize, 1)
        sources = input_sets(lambda seed: {"x": torch.ones(count, dtype=dtype, device=device)}, device)
        found[COPY] = [tensors["x"].clone for tensors in sources], 2 * count * dtype.itemsize, None
    if case.operations:
        size = 64 if case.operations < 1e6 else 4096 if device.type == "cuda" else 1024
        for precision in sorted(precisions):
            dtype = next(dtype for dtype, short in SHORT.items() if short == precision)
            matrix = torch.rand(size, size, device=device).to(dtype)
            found[MATMUL + precision] = [partial(torch.mm, matrix, matrix)], None, 2 * size**3
    return found


def add_shares(rows: dict[str, dict], precision_of: Callable[[str], str]):
    """Add each row's share of the copy and of the best matrix product, and its ratio to the first time per pixel."""
    copy = rows.get(COPY, {})
    pixel = next((row["ns_pixel"] for row in rows.values() if row.get("ns_pixel")), None)
    for name, row in rows.items():
        matmul = rows.get(MATMUL + precision_of(name))
        if row.get("gb_s") and copy:
            row["of_copy"] = row["gb_s"] / copy["gb_s"]
        if row.get("gflop_s") and matmul:
            row["of_matmul"] = row["gflop_s"] / (matmul["gflop_s"] * matmul["ms"] / matmul["ms_min"])
        if row.get("ns_pixel"):
            row["x_pixel"] = row["ns_pixel"] / pixel


def summary(values: list[float]) -> dict:
    """Return the statistics of several runs in milliseconds."""
    quartiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return {
        "ms": statistics.median(values),
        "ms_min": min(values),
        "ms_max": max(values),
        "ms_quartiles": quartiles.tolist(),
        "runs": len(values),
    }


def measure(call: Callable, device: torch.device, kernels_only: bool) -> tuple[float, float | None]:
    """Return the milliseconds of one call and, on CUDA, the peak memory that it adds in MB."""
    if device.type != "cuda":
        start = time.perf_counter()
        kept = call()  # noqa: F841 - freed after the clock has stopped
        return 1000 * (time.perf_counter() - start), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for cycles in SLEEPS if kernels_only else [0]:
        if cycles:
            torch.cuda._sleep(cycles)
        begin.record()
        call()
        end.record()
        if not begin.query():  # the host queued everything before the GPU woke up: launches are not in the time
            break
    end.synchronize()
    return begin.elapsed_time(end), (torch.cuda.max_memory_allocated(device) - before) / 2**20
