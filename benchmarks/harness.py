"""What the benchmarks share: a check before any timing, providers that take turns, and clocks.

A provider is a function of one input set (tensors by name) that returns the call to time; what it does before it
returns, another layout or an autograd graph, is not timed. A text in its place says why a provider is absent.
"""

import ctypes
import importlib
import math
import platform
import random
import statistics
import sys
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
SERVES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # backend: type of the device that it is timed on
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MATMUL = "matmul "  # and in what
LEAST_CACHE = 64 * 2**20  # of a CPU that does not tell
WARM_UP, MAX_SETS = 3, 32
SLEEPS = 10**6, 8 * 10**6, 64 * 10**6  # cycles of a GPU: half a millisecond to a thirtieth of a second
MODES = ("forward", "backward", "both")

InputSet = dict[str, Tensor]
Provider = Callable[[InputSet], Callable[[], object]]


@dataclass
class Case:
    """One table: what runs, on which inputs, and what the results should be.

    A result may miss the truth by twice what eager PyTorch in the same dtype misses it by, plus `atol`, all relative to
    the largest value of that result. Names of eager providers begin with `yardstick`; the worst of them counts.
    A list of tensors within `truth`, as the gradients of a network, is one result. `bytes` has each tensor once.
    Without a yardstick, `()`, `atol` is all that is allowed.
    """

    providers: dict[str, Provider | str]
    inputs: list[InputSet]
    truth: list[Tensor | list[Tensor]]
    yardstick: str | tuple[()]
    atol: float
    bytes: int | None = None
    operations: int | None = None
    pixels: int | None = None  # of the input, where time per pixel is the question
    kernels_only: bool = True  # not the host's launches on CUDA, not fresh pages on the CPU
    pause: float = 0  # seconds between turns, for other runtimes' threads to stop spinning
    first_is_lost: bool = False  # a turn is two calls, the second one timed: what others left in memory is their matter
    images: int | None = None  # of a call, where images per second are the question
    kind: str | None = None  # in what the providers compute, "bf16" say, where neither names nor inputs tell
    patience: float = math.inf  # seconds that one provider may take in all its turns; then it gets no more of them
    more: dict[str, dict] = field(
        default_factory=dict
    )  # further figures of a provider, which it may fill when it is made


def operator(function: Callable, mode: str = "forward", layout: torch.memory_format | None = None) -> Provider:
    """Return a provider of an operator's forward, of its backward alone, or of both in one call.

    With a backward, input sets have "upstream...", the gradient of each floating result in order.
    """

    def prepare(tensors: InputSet) -> Callable:
        if layout:
            tensors = {key: t.contiguous(memory_format=layout) if t.dim() == 4 else t for key, t in tensors.items()}
        if mode == "forward":
            return torch.no_grad()(partial(function, **tensors))
        tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
        upstream = [tensors.pop(name).detach() for name in list(tensors) if name.startswith("upstream")]
        leaves = [t for t in tensors.values() if t.requires_grad]

        def both() -> list[Tensor]:
            y = as_list(function(**tensors))
            return [*y, *torch.autograd.grad(y, leaves, upstream)]

        if mode == "both":
            return both
        y = as_list(function(**tensors))
        return partial(torch.autograd.grad, y, leaves, upstream, retain_graph=True)

    return prepare


def inside(context: Callable, provider: Provider) -> Provider:
    """Return a provider that prepares and runs inside of `context()`."""

    def run(function: Callable, *arguments):
        with context():
            return function(*arguments)

    return lambda tensors: partial(run, run(provider, tensors))


def ours(provider: Provider, device: torch.device, instruction_sets: bool = False) -> dict[str, Provider | str]:
    """Return `provider` on each backend that serves `device` and, if asked, on each of the CPU's instruction sets."""
    info, table = seemore_fast.backend_info(), {}
    for backend in (name for name, kind in SERVES.items() if kind == device.type):
        there = inside(partial(seemore_fast.use_backend, backend), provider)
        table[f"{OURS} {backend}"] = info["unavailable"].get(backend, there)
    if instruction_sets and callable(table.get(f"{OURS} cpu")):
        for name in info["cpu"].get("instruction_sets", []):
            table[f"{OURS} cpu {name}"] = inside(partial(instruction_set, name), table[f"{OURS} cpu"])
    return table


@contextmanager
def instruction_set(name: str):
    native = seemore_fast.backends.native
    before = native.instruction_set()
    native.use_instruction_set(name)
    try:
        yield
    finally:
        native.use_instruction_set(before)


def missing(module: str) -> str | None:
    """Return None for a module that can be imported, else why not and what installs it."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        more = " and pip install --no-deps seemore" if module.startswith("seemore") else ""
        return f"{error}: pip install 'seemore-fast[bench]'{more}"


def published() -> type | str:
    """Return the SeemoRe of PyPI's `seemore`, a port of the published code, or why it cannot be imported."""
    return missing("seemore.module") or sys.modules["seemore.module"].SeemoRe


def memory_format(model: torch.nn.Module) -> torch.memory_format:
    """Return the layout that a SeemoRe's dense convolutions have, for its input."""
    channels_last = model.conv_2.weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int) -> InputSet:
    """Return normal tensors; weights are scaled so that results are near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    scale = {name: math.prod(shape[1:]) ** -0.5 if name.startswith("weight") else 1 for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    return {name: (scale[name] * t).to(dtype) for name, t in tensors.items()}


def input_sets(make: Callable[[int], InputSet], device: torch.device, most: int | None = None) -> list[InputSet]:
    """Return make(0), make(1), ..., over twice the last-level cache together: none is there from its last use."""
    first = make(0)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else cpu_cache()
    count = min(2 * cache // sum(t.nbytes for t in first.values()) + 1, most or MAX_SETS)
    return [first, *map(make, range(1, count))]


def cpu_cache(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Return the bytes of the CPU's last-level cache, as Linux tells them, and at least LEAST_CACHE."""
    units, largest = {"K": 2**10, "M": 2**20, "G": 2**30}, LEAST_CACHE
    for file in Path(folder).glob("index*/size"):
        text = file.read_text().strip()
        largest = max(largest, int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return largest


def operator_case(
    providers: dict, inputs: list, reference: Callable, mode: str, operations: int, traffic: int | None = None
) -> Case:
    """Return the Case of one operator; its yardstick is "torch eager".

    Unless `traffic` tells the bytes, every input and every result counts once; in one call of both, forward and
    backward each read the inputs.
    """
    wide = {name: t.double().contiguous() if t.is_floating_point() else t for name, t in inputs[0].items()}
    truth = as_list(operator(reference, mode)(wide)())
    dtype = next(iter(inputs[0].values())).dtype
    if traffic is None:
        reads = {name: 2 if mode == "both" and not name.startswith("upstream") else 1 for name in inputs[0]}
        traffic = sum(reads[name] * t.nbytes for name, t in inputs[0].items())
        traffic += sum(t.numel() for t in truth) * dtype.itemsize
    atol = max(torch.finfo(dtype).eps / 2, 1e-6)  # half a rounding step; in float32, another order of summation
    return Case(providers, inputs, truth, "torch eager", atol, traffic, operations)


def as_list(results: object) -> list:
    """Return results as a list, without those of integers: a router's choice is judged by its probabilities."""
    results = [results] if isinstance(results, Tensor) else list(results)
    return [r for r in results if not isinstance(r, Tensor) or r.is_floating_point()]


def deviation(actual: Tensor | list[Tensor], exact: Tensor | list[Tensor]) -> float:
    """Return the largest difference, relative to the largest exact value."""
    actual, exact = (torch.cat([t.double().flatten() for t in as_list(tensors)]) for tensors in (actual, exact))
    return (actual - exact).abs().max().item() / (exact.abs().max().item() or 1)


def check(case: Case) -> tuple[dict, dict]:
    """Return every provider's line of figures and, of those that are right, the calls, one per input set."""
    lines, calls, allowed = {}, {}, [case.atol] * len(case.truth)
    for name, provider in sorted(case.providers.items(), key=lambda item: not item[0].startswith(case.yardstick)):
        if isinstance(provider, str):
            lines[name] = {"absent": provider}
            continue
        try:
            ready = [provider(tensors) for tensors in case.inputs]
            errors = [deviation(*pair) for pair in zip(as_list(ready[0]()), case.truth, strict=True)]
        except Exception as failure:  # a provider that breaks is a result, not the end of the benchmark
            lines[name] = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
            continue
        if name.startswith(case.yardstick) and all(map(math.isfinite, errors)):
            allowed = [max(limit, case.atol + 2 * error) for limit, error in zip(allowed, errors, strict=True)]
        # not <=: NaN is wrong, too
        wrong = [f"result {i} errs by {e:.1e} > {allowed[i]:.1e}" for i, e in enumerate(errors) if not e <= allowed[i]]
        lines[name] = {"wrong": "; ".join(wrong)} if wrong else {"max_error": max(errors)}
        calls |= {} if wrong else {name: ready}
    return {name: lines[name] for name in case.providers}, calls


def keep_memory():
    """Have glibc keep freed memory: results on fresh pages, which only some calls get, can take five times as long."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_case(cases: Case | list[Case], device: torch.device, runs: int) -> dict:
    """Return every provider's line of figures: checked, then timed in turns; the median of `runs` counts.

    Several cases take turns together, each with providers, inputs, truth and tolerance of its own.
    """
    cases = [cases] if isinstance(cases, Case) else cases
    first = cases[0]
    if first.kernels_only:
        keep_memory()
        functorch_config.donated_buffer = False  # lets a compiled backward run more than once on a graph
    lines, calls, case_of = {}, {}, {}
    for case in cases:
        checked, ready = check(case)
        lines, calls, case_of = lines | checked, calls | ready, case_of | dict.fromkeys(ready, case)
    work = {name: (case.bytes, case.operations) for name, case in case_of.items()}
    kinds = {kind_of(name, case) for case in cases for name in case.providers}
    for name, (ready, *amounts) in floors(first, device, kinds).items():
        calls[name], work[name] = ready, amounts
    times, peaks, shuffled = {name: [] for name in calls}, {}, random.Random(0)
    # Each round has its own order, so that nobody always runs after the same other; each turn has the next inputs.
    turns = [name for _ in range(WARM_UP + runs) for name in shuffled.sample(list(calls), len(calls))]
    for turn, name in enumerate(turns):
        if sum(times[name]) * (1 + first.first_is_lost) > 1000 * first.patience:
            continue
        time.sleep(first.pause)
        call = calls[name][turn % len(calls[name])]
        if first.first_is_lost:
            call()
        milliseconds, peaks[name] = measure(call, device, first.kernels_only)
        times[name].append(milliseconds)
    times = {name: values[WARM_UP:] or values[-1:] for name, values in times.items()}
    best = {}  # of ours, among those that did the same work
    for name, case in case_of.items():
        if name.startswith(OURS) and not name.endswith(IN_A_GRAPH):  # the peers are not in one
            best[id(case)] = min(statistics.median(times[name]), best.get(id(case), math.inf))
    for name, values in times.items():
        ms, (traffic, operations) = statistics.median(values), work[name]
        case = case_of.get(name, first)
        same_work = id(case) in best and not case.pixels and not name.startswith(MATMUL)
        line = summary(values) | {"x_ours": ms / best[id(case)] if same_work else None}
        line |= {"gb_s": traffic and traffic / ms / 1e6, "gflop_s": operations and operations / ms / 1e6}
        line |= {"images_s": 1000 * case.images / ms if case.images and name in case_of else None}
        line |= {"ns_pixel": ms / case.pixels * 1e6 if case.pixels and name in case_of else None}
        lines[name] = lines.get(name, {}) | line | {"peak_mb": peaks[name]} | case.more.get(name, {})
    relate(lines, lambda name: kind_of(name, case_of.get(name, first)))
    return lines


def kind_of(name: str, case: Case) -> str:
    """Return in what a provider computes, "fp32" say: as its name tells, else the case, else its inputs."""
    told = [kind for kind in SHORT.values() if kind in name.split()]
    return told[0] if told else case.kind or SHORT.get(next(iter(case.inputs[0].values())).dtype, "fp32")


def floors(case: Case, device: torch.device, kinds: Iterable[str]) -> dict[str, tuple]:
    """Return (calls, bytes, operations) by name, to see what this machine reaches in the same minutes.

    A copy that moves as many bytes, if the case tells them: half of them read, half written, from sources that exceed
    the cache as the inputs do. Multiplying matrices, in each of `kinds`, if the case tells its operations.
    """
    found = {}
    if case.bytes:
        dtype = next(iter(case.inputs[0].values())).dtype
        count = max(case.bytes // 2 // dtype.itemsize, 1)
        sources = input_sets(lambda seed: {"x": torch.ones(count, dtype=dtype, device=device)}, device)
        found["clone"] = [tensors["x"].clone for tensors in sources], 2 * count * dtype.itemsize, None
    if case.operations:
        size = 64 if case.operations < 1e6 else 4096 if device.type == "cuda" else 1024
        for kind in sorted(kinds):
            dtype = next(dtype for dtype, short in SHORT.items() if short == kind)
            matrix = torch.rand(size, size, device=device).to(dtype)
            found[f"{MATMUL}{kind}"] = [partial(torch.mm, matrix, matrix)], None, 2 * size**3
    return found


def relate(lines: dict, kind_of: Callable[[str], str]):
    """Add what relates lines: to the copy, to the best product of matrices in their dtype, to the first per pixel."""
    copy = lines.get("clone", {})
    pixel = next((line["ns_pixel"] for line in lines.values() if line.get("ns_pixel")), None)
    for name, line in lines.items():
        matmul = lines.get(MATMUL + kind_of(name))
        if line.get("gb_s") and copy:
            line["of_copy"] = line["gb_s"] / copy["gb_s"]
        if line.get("gflop_s") and matmul:
            line["of_matmul"] = line["gflop_s"] / (matmul["gflop_s"] * matmul["ms"] / matmul["ms_min"])
        if line.get("ns_pixel"):
            line["x_pixel"] = line["ns_pixel"] / pixel


def summary(values: list[float]) -> dict:
    """Return the figures of the milliseconds of several runs."""
    quartiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return {
        "ms": statistics.median(values),
        "ms_min": min(values),
        "ms_max": max(values),
        "ms_quartiles": quartiles.tolist(),
        "runs": len(values),
    }


def measure(call: Callable, device: torch.device, kernels_only: bool) -> tuple[float, float | None]:
    """Return milliseconds of one call and, on CUDA, how many MB it added to those in use at most."""
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
        if not begin.query():  # the host had queued it all before the GPU woke up: no launch is in the time
            break
    end.synchronize()
    return begin.elapsed_time(end), (torch.cuda.max_memory_allocated(device) - before) / 2**20


def weighed(name: str, provider: Provider | str, figures: dict[str, dict]) -> Provider | str:
    """Return a provider that notes in figures[name], when it is made, the memory of a call (`Case.more`)."""

    def prepare(tensors: InputSet) -> Callable:
        call = provider(tensors)
        if name not in figures:
            call()  # the first loads what it needs
            figures[name] = {"step_mb": grown_megabytes(call)}
        return call

    return provider if isinstance(provider, str) else prepare


def grown_megabytes(call: Callable) -> float | None:
    """Return by how much resident memory grows in a call at most, in MB; None where Linux does not tell."""
    try:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not be seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 1e3
    except OSError:
        return None


def resident(field: str) -> int:
    """Return a field of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
