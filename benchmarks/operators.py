"""What the benchmarks of single operators share: titles, inputs, and who takes part."""

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import seemore_fast
from seemore_fast import ops, reference
from seemore_fast.benchmarks import harness

# The shapes that count on a GPU: T at 480x640, a batch of training patches, B and L at 720p
PHOTO, PATCHES, LARGE = (1, 36, 480, 640), (32, 36, 64, 64), (1, 48, 720, 1280)
ON_CUDA = [(shape, dtype) for shape in (PHOTO, PATCHES, LARGE) for dtype in (torch.float32, torch.bfloat16)]
ON_CUDA.append((PHOTO, torch.float16))
# On a CPU: what T enlarges to 720p, and the patches
CPU_PHOTO = (1, 36, 360, 640)
ON_CPU = [(CPU_PHOTO, torch.float32), (CPU_PHOTO, torch.bfloat16), (PATCHES, torch.float32)]


class Setting(NamedTuple):
    """What an operator without options of its own is timed on."""

    shape: tuple[int, int, int, int]  # of the first image: (B, C, H, W)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mode: str = "forward"

    def title(self) -> str:
        return title(self)


CPU, CUDA = ([Setting(*setting) for setting in settings] for settings in (ON_CPU, ON_CUDA))
QUICK = [Setting((1, 5, 9, 14)), Setting((2, 4, 9, 14), torch.bfloat16, channels_last=True)]
# Of a block's gradients, over few pixels, a single rounding of bfloat16 decides who errs more.
QUICK_BLOCK = [QUICK[0], Setting((2, 8, 24, 24), torch.bfloat16, channels_last=True)]


def cases(
    quick: list[NamedTuple] = QUICK, cpu: list[NamedTuple] = CPU, cuda: list[NamedTuple] = CUDA
) -> dict[str, dict[str, NamedTuple]]:
    """Return the settings in every mode, by title, for tiny trials, a CPU and a GPU."""
    table = {"quick": quick, "cpu": cpu, "cuda": cuda}
    for kind, settings in table.items():
        in_modes = [setting._replace(mode=mode) for mode in harness.MODES for setting in settings]
        table[kind] = {setting.title(): setting for setting in in_modes}
    return table


def title(setting: NamedTuple, *words: str) -> str:
    """Return mode, shape, words and dtype of a setting, and whether its images are channels_last."""
    layout = ["channels_last"] if setting.channels_last else []
    return " ".join([setting.mode, "x".join(map(str, setting.shape)), *words, harness.SHORT[setting.dtype], *layout])


BLOCKS = ("rme_block", "sme_block")
BORROWED = {"pointwise": "norm_pointwise", "conv3x3_shuffle": "norm_conv3x3"}  # whose kernel does for whom


def in_a_graph(provider: harness.Provider) -> harness.Provider:
    """Return a provider whose call replays a CUDA graph of the other's call."""

    def prepare(tensors: harness.InputSet) -> Callable:
        call, stream = provider(tensors), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # loads kernels, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()

        def replay() -> object:
            graph.replay()
            return results

        return replay

    return prepare


def ours(stem: str, fused: Callable, mode: str, device: torch.device, instruction_sets: bool) -> dict:
    """Return the operator on every backend that has it; where none does, on the reference, to try the call.

    A block is made of operators, each on the backend that `auto` chooses for it.
    """
    provider = harness.operator(fused, mode)
    if stem in BLOCKS:
        return {f"{harness.OURS} auto": harness.inside(partial(seemore_fast.use_backend, "auto"), provider)}
    table = harness.ours(provider, device, instruction_sets)
    kernels = seemore_fast.backend_info()["operators"]
    have = kernels.get(stem, []) + kernels.get(BORROWED.get(stem), [])
    for name, there in table.items():
        if callable(there) and name.split()[1] not in have:
            table[name] = f"this backend has no kernel of {stem}"
    gpu = f"{harness.OURS} {'cuda' if 'cuda' in have or 'triton' not in have else 'triton'}"
    if mode == "forward" and gpu in table:
        there = table[gpu]
        table[gpu + harness.IN_A_GRAPH] = in_a_graph(there) if callable(there) else there
    if not any(map(callable, table.values())):
        plain = partial(seemore_fast.use_backend, "reference")
        table[f"{harness.OURS} reference"] = harness.inside(plain, provider)
    return table


def build(
    stem: str,
    setting: NamedTuple,
    images: dict[str, tuple[int, ...]],
    parameters: dict[str, tuple[int, ...]],
    device: torch.device,
    arguments,
    operations: int,
    upstream: tuple[int, ...] | list[tuple[int, ...]] | None = None,
    traffic: int | None = None,
    **options,
) -> harness.Case:
    """Return the Case of operator `stem`, against eager PyTorch in two layouts and, if asked, torch.compile.

    `upstream` are the shapes of the results, or of the one, where that is not `setting`'s; what is no image is float32.
    `options` are the operator's.
    """
    mode, layout = setting.mode, torch.channels_last if setting.channels_last else torch.contiguous_format
    results = upstream if isinstance(upstream, list) else [upstream or setting.shape]
    upstreams = {f"upstream_{i}": shape for i, shape in enumerate(results)}
    shapes = images | parameters | ({} if mode == "forward" else upstreams)

    def make(seed: int) -> harness.InputSet:
        tensors = harness.random_tensors(shapes, setting.dtype, device, seed)
        for name in tensors.keys() - parameters.keys():
            if tensors[name].dim() == 4:
                tensors[name] = tensors[name].contiguous(memory_format=layout)
            else:
                tensors[name] = tensors[name].float()
        return tensors

    eager, fused = (partial(getattr(module, stem), **options) for module in (reference, ops))
    providers = ours(stem, fused, mode, device, arguments.instruction_sets)
    providers |= {
        "torch eager": harness.operator(eager, mode, torch.contiguous_format),
        "torch eager channels_last": harness.operator(eager, mode, torch.channels_last),
    }
    if arguments.compile:
        providers["torch.compile"] = harness.operator(torch.compile(eager), mode)
    return harness.operator_case(providers, harness.input_sets(make, device), eager, mode, operations, traffic)


class Checked:
    """A case whose providers were compared with the truth, and what this machine reaches in the same minutes."""

    def __init__(self, case: harness.Case, device: torch.device, rounds: int):
        self.rounds, self._case, self._device = rounds, case, device
        self._kind = harness.kind_of("", case)
        harness.keep_memory()
        self.lines, self.calls = harness.check(case)
        self._ceilings = {}
        for name, (calls, traffic, operations) in harness.floors(case, device, [self._kind]).items():
            turns = [harness.measure(calls[i % len(calls)], device, True)[0] for i in range(harness.WARM_UP + rounds)]
            self._ceilings[name] = (traffic or operations) / statistics.median(turns[harness.WARM_UP :]) / 1e6

    def finish(self, call: Callable):
        """Run a call to its end, on a GPU too."""
        call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def rates(self, milliseconds: float) -> dict[str, float]:
        """Return GB/s and GFLOP/s of a call, and their shares of a copy's and of a product of matrices'."""
        found = {}
        for rate, share, amount, name in (
            ("gb_s", "of_copy", self._case.bytes, "clone"),
            ("gflop_s", "of_matmul", self._case.operations, harness.MATMUL + self._kind),
        ):
            if amount:
                found[rate] = amount / milliseconds / 1e6
                found[share] = found[rate] / self._ceilings[name]
        return found


def test_speed(title: str, provider: str, checked: Callable[[str], Checked], benchmark):
    """Time a provider in a case of the benchmark that has this function: `pytest benchmarks/` (conftest.py).

    Who is wrong fails, and is not timed. pytest-benchmark's JSON gets rates, their shares of what a copy and a product
    of matrices reached, and the largest error as extra_info.
    """
    import pytest  # not at the top: who runs the scripts does not need it

    case = checked(title)
    line = case.lines.get(provider, {"absent": "takes no part in this case"})
    if "absent" in line:
        pytest.skip(line["absent"])
    if provider not in case.calls:
        pytest.fail(line.get("wrong") or line["failed"])
    calls, warm_up = itertools.cycle(case.calls[provider]), min(case.rounds, harness.WARM_UP)
    benchmark.group = title
    benchmark.pedantic(case.finish, setup=lambda: ((next(calls),), {}), rounds=case.rounds, warmup_rounds=warm_up)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info |= line | case.rates(1000 * benchmark.stats.stats.median)
