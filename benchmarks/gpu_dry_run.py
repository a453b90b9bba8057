"""Count the launches and compiled kernels of a call on a GPU, and time its host code, without a GPU.

    python benchmarks/gpu_dry_run.py              inference, by operators and by the engine, and a training step of T
    python benchmarks/gpu_dry_run.py --json       the same as JSON
    python benchmarks/gpu_dry_run.py --launches   all launches by kernel and grid, too

The model runs its host code on CPU tensors, and Triton's binder decides which kernels to compile. The driver reports
sm_90; nothing is compiled and nothing is launched, so results are uninitialised memory.

| figure            | meaning                                                                                     |
|-------------------|---------------------------------------------------------------------------------------------|
| launches          | launches of this package's kernels per call                                                 |
| torch_kernels     | operators of torch that would launch kernels, including those in this package's operators   |
| variants          | kernels compiled for the case's size                                                        |
| variants_40_sizes | kernels compiled for that size and 40 random ones together                                  |
| host_ms           | processor time of the calling thread for tiny images, the minimum of many calls             |

`host_ms` does not contain the launches themselves: about 3 us a kernel in the driver. The engine's case needs a
checkout, whose tests compile the CUDA library's sources for the host; they note launches instead of running them.
"""

import contextlib
import json
import os
import random
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read at imports; interpreted kernels have no binder

import torch

ARCHITECTURE = 90
SIZES, SEED = 40, 0
WARM_UPS, REPEATS = 5, 60


class Variant(NamedTuple):
    """A kernel as specialised by Triton's binder, with the options of its compilation."""

    kernel: Any  # triton.JITFunction
    signature: dict
    constexprs: dict
    attrs: dict
    options: Any

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, capability: int = ARCHITECTURE):
        """Compile it with Triton's ptxas."""
        import triton

        source = triton.compiler.ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options.__dict__)


class Launched(NamedTuple):
    variant: Variant
    grid: int
    arguments: tuple


class Stub:
    """Stand-in for a compiled kernel, which appends its launches to `launched`, if that is a list."""

    function, packed_metadata = 0, ()
    launched: list[Launched] | None = None

    def __init__(self, variant: Variant):
        self.variant = variant

    def launch_metadata(self, *_):
        return None

    def run(self, grid, _, __, stream, function, packed, metadata, enter, leave, *arguments):
        if Stub.launched is not None:
            Stub.launched.append(Launched(self.variant, grid, arguments))


@contextlib.contextmanager
def dry_run(architecture: int = ARCHITECTURE) -> Iterator[dict[Any, Variant]]:
    """Make operators on CPU tensors choose Triton and launch nothing; yield the compiled kernels by key."""
    import triton.runtime.driver
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import seemore_fast
    from seemore_fast.backends import selection

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels have no binder; unset it in this process")
    compiled = {}

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        variant = Variant(self, dict(signature), dict(constexprs), dict(attrs), options)
        compiled[self.__name__, str(key)] = variant
        stub = self.device_caches[device][0][key] = Stub(variant)
        return stub

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compile_nothing),
            mock.patch.object(selection, "interpreted", lambda: True),  # Triton takes CPU tensors
            seemore_fast.use_backend("triton"),
        ):
            yield compiled
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def launches() -> Iterator[list[Launched]]:
    """Yield the launches within."""
    Stub.launched = found = []
    try:
        yield found
    finally:
        Stub.launched = None


def torch_kernels(run: Callable[[], Any]) -> Counter:
    """Count a call's operators of torch that launch kernels by name, including those in this package's operators."""
    from seemore_fast.network import replay

    class Count(replay.InsideOperators):
        def see(self, function, arguments, options):
            if replay.computes(function):
                count[replay.name_of(function)] += 1
            return function(*arguments, **options)

    count = Counter()
    with Count():
        run()
    return count


class Case(NamedTuple):
    """A call to measure: `run` of an image (batch, 3, side, side)."""

    run: Callable[[torch.Tensor], Any]
    size: tuple[int, int, int]  # batch, height, width
    sides: tuple[int, int, int]  # of random images: minimum, limit and step
    batch: int  # of random images

    def image(self, batch: int, height: int, width: int) -> torch.Tensor:
        return torch.rand(batch, 3, height, width)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return SIZES random sizes, the same ones in every run."""
        chosen, (least, most, step) = random.Random(SEED), self.sides
        return [(self.batch, *(chosen.randrange(least, most, step) for _ in range(2))) for _ in range(SIZES)]


def cases() -> dict[str, Case]:
    from seemore_fast import seemore_t

    prepared, trained = seemore_t(scale=4).to(torch.bfloat16).eval().prepare(), seemore_t(scale=2).train()

    def infer(x):
        with torch.inference_mode():
            return prepared(x)

    def step(x):
        trained.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = trained(x)
        torch.nn.functional.l1_loss(y.float(), torch.zeros_like(y)).backward()

    return {
        "inference T x4 480x640 bf16": Case(infer, (1, 480, 640), (60, 800, 1), 1),
        "training T x2 32x64x64 bf16": Case(step, (32, 64, 64), (32, 97, 2), 2),
    }


def measure(case: Case, compiled: dict) -> tuple[dict, Counter]:
    """Return the figures of a case and its launches; `compiled` comes from `dry_run`."""
    for variant in compiled.values():  # of a case before, which Triton would not compile again
        variant.kernel.device_caches.clear()
    compiled.clear()
    x = case.image(*case.size)
    with launches() as found:
        case.run(x)
    of_torch = torch_kernels(lambda: case.run(x))
    one_size = len(compiled)
    for size in case.sizes():
        case.run(case.image(*size))
    figures = dict(launches=len(found), torch_kernels=of_torch.total(), variants=one_size)
    launched = Counter(f"{launch.variant.name}, grid {launch.grid}" for launch in found)
    launched.update({f"torch {name}": count for name, count in of_torch.items()})
    return figures | dict(variants_40_sizes=len(compiled), host_ms=host_ms(case)), launched


def host_ms(case: Case) -> float:
    tiny = case.image(case.batch, 16, 16)
    times = []
    for _ in range(WARM_UPS + REPEATS):
        start = time.thread_time()
        case.run(tiny)
        times.append(time.thread_time() - start)
    return round(1e3 * min(times[WARM_UPS:]), 2)


ENGINE = "inference by the engine T x4 480x640 bf16"


def measure_engine() -> dict[str, Any]:
    """Return the figures of a prepared call of the CUDA library's engine."""
    import ctypes

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers import backends, cuda_host

    from seemore_fast import seemore_t

    library = ctypes.CDLL(str(cuda_host.library()))
    library.recorded.restype = ctypes.c_char_p

    def infer(x):
        library.record(1)  # afresh
        with torch.inference_mode():
            return model(x)

    case = Case(infer, (1, 480, 640), (60, 800, 1), 1)
    with backends.running_on("cuda_host", "cpu"):
        model = seemore_t(scale=4).to(torch.bfloat16).eval().prepare()
        infer(case.image(*case.size))
        launches = library.recorded().decode().count("\n")
        figures = dict(launches=launches, host_ms=host_ms(case))
        library.record(0)
    return figures


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--launches", action="store_true", help="print all launches by kernel and grid")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the host code is one thread
    with dry_run() as compiled:
        measured = {title: measure(case, compiled) for title, case in cases().items()}
    with contextlib.suppress(ImportError):  # outside of a checkout
        measured[ENGINE] = measure_engine(), Counter()
    if options.json:
        print(json.dumps({title: figures for title, (figures, _) in measured.items()}, indent=1))
    else:
        for title, (figures, _) in measured.items():
            print(title, *(f"   {name:18} {value}" for name, value in figures.items()), sep="\n")
    for title, (_, launched) in measured.items() if options.launches else ():
        print(title, *(f"{count:6} x {name}" for name, count in launched.items()), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
