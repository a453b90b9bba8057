"""A launch of a Triton kernel as data: run it, or compile it ahead of time for a GPU that is not there.

An operator describes its launches once, so that what is compiled in a test is what runs:

    def forward(y, x): yield Launch(kernel, programs, dict(y=y, x=x, ...))
    operator = launched(forward)                         # a function that runs them
    operator(y, x)                                       # on a GPU, or on the CPU under TRITON_INTERPRET=1
    for launch in forward(y_meta, x_meta):               # tensors on the meta device do
        compiled = launch.compile_for(90)                # no GPU needed, but TRITON_INTERPRET must not be set
        assert compiled.resources().local == 0
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    registers: int  # per thread
    local: int  # bytes per thread: spilled registers and arrays, which ptxas calls stack
    shared: int  # bytes per block


class Compiled(NamedTuple):
    ptx: str
    cubin: bytes
    dynamic_shared: int  # bytes per block, asked for at launch; the cubin knows only static ones

    def resources(self) -> Resources:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            (found,) = (kernel for kernels in resources(file.name).values() for kernel in kernels.values())
        return found._replace(shared=found.shared + self.dynamic_shared)


@dataclass(frozen=True)
class Launch:
    """`programs` instances of `kernel` with `arguments`, its parameters by name: tensors, integers, tuples, None."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int = 4
    more_options: dict[str, Any] = field(default_factory=dict)  # of the compiler, such as maxnreg
    join: Callable[[list["Launch"]], list["Launch"]] | None = None  # makes few launches of many (`joining`)

    @property
    def options(self) -> dict[str, Any]:
        # enable_fp_fusion is stated because its default differs among versions of Triton
        return dict(num_warps=self.num_warps, enable_fp_fusion=True) | self.more_options

    @property
    def jit_options(self) -> dict[str, Any]:
        """The options with those that Triton's JIT adds, so that what it has compiled is found in its cache."""
        debug = bool(self.kernel.debug or triton.knobs.runtime.debug)
        return self.options | dict(debug=debug, instrumentation_mode=triton.knobs.compilation.instrumentation_mode)

    def run(self):
        pending, observer = getattr(_thread, "pending", None), getattr(_thread, "observer", None)
        if self.join is not None and pending is not None:
            pending.append(self)
        elif observer is None:
            self.start()
        else:
            observer(self)

    def start(self):
        """Run it and return the compiled kernel; None in the interpreter."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options)

    def specialization(self) -> dict[str, dict]:
        """Return signature, constexprs and attrs of the kernel that Triton compiles at this launch."""
        signature, constexprs, attrs = {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constexprs[(position,)] = "constexpr", value
            elif parameter.do_not_specialize and isinstance(value, int):
                signature[parameter.name] = integer_type(value)
            else:
                signature[parameter.name] = specialize(value, (position,), constexprs, attrs)
        return dict(signature=signature, constexprs=constexprs, attrs=attrs)

    def compile_for(self, capability: int) -> Compiled:
        """Compile for compute capability `capability` (90 is sm_90) by the ptxas that Triton brings."""
        if not isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled")
        source = triton.compiler.ASTSource(self.kernel, **self.specialization())
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=self.jit_options)
        return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


_thread = threading.local()


@contextlib.contextmanager
def observed(observer: Callable[[Launch], None]):
    """Let `observer` start the launches of this thread within."""
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = None


@contextlib.contextmanager
def joining(device: torch.device) -> Iterator[None]:
    """Put off this thread's launches that sum up parameters' gradients to few at the end.

    What they read must stay as it is until then: results of the operators within are not to be changed in place.
    """
    if getattr(_thread, "pending", None) is not None:  # the outermost one joins
        yield
        return
    _thread.pending = pending = []
    try:
        yield
    finally:
        _thread.pending = None
    kinds = dict.fromkeys(launch.join for launch in pending)
    for join in sorted(kinds, key=lambda join: join.stage):
        run(join([launch for launch in pending if launch.join is join]), device)


def joined(stage: int):
    """Mark a function that joins launches: those of a stage read what launches of earlier ones write."""

    def mark(join):
        join.stage = stage
        return join

    return mark


class Start:
    """Compiled kernel and arguments of a launch to be repeated with other pointers (`seemore_fast.network.replay`)."""

    def __init__(self, launch: Launch, compiled, place_of: Callable):
        """`place_of` returns where an argument lies: a memory and an offset in it, or what is constant."""
        self._compiled, self._grid = compiled, (launch.programs, 1, 1)
        self._constants = []  # tensors whose addresses stay as long as they do
        found = [self._find(launch.arguments[parameter.name], place_of) for parameter in launch.kernel.params]
        self._arguments = found
        self._places = [(i, value.memory, value.offset) for i, value in enumerate(found) if hasattr(value, "memory")]
        self._tuples = [(i, value) for i, value in enumerate(found) if is_tuple(value) and has_place(value)]

    def _find(self, value: Any, place_of: Callable) -> Any:
        if is_tuple(value):
            return tuple(self._find(item, place_of) for item in value)
        value = place_of(value)
        if isinstance(value, Tensor):
            self._constants.append(value)
            return value.data_ptr()
        return value

    def run(self, bases, now: "Now"):
        arguments, addresses = self._arguments.copy(), bases.addresses
        for position, memory, offset in self._places:
            arguments[position] = addresses[memory] + offset
        for position, value in self._tuples:
            arguments[position] = resolved(value, addresses)
        compiled, stream, hooks = self._compiled, now.stream, now.hooks
        metadata = None if hooks == NO_HOOKS else compiled.launch_metadata(self._grid, stream, *arguments)
        compiled.run(*self._grid, stream, compiled.function, compiled.packed_metadata, metadata, *hooks, *arguments)


def is_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and not hasattr(value, "memory")


def has_place(value: Any) -> bool:
    return any(map(has_place, value)) if is_tuple(value) else hasattr(value, "memory")


def resolved(value: Any, addresses: list[int]) -> Any:
    """Return a tuple, in which tuples may be, with addresses in place of places."""
    if is_tuple(value):
        return tuple(resolved(item, addresses) for item in value)
    return addresses[value.memory] + value.offset if hasattr(value, "memory") else value


NO_HOOKS = (None, None)


class Now(NamedTuple):
    """What launches take from the state of the thread: the device's current stream, and a profiler's hooks."""

    stream: int
    hooks: tuple = NO_HOOKS


def now() -> Now | None:
    """Return that for the current device; None in the interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    in_use = hooks if any(hook.calls for hook in hooks) else NO_HOOKS
    return Now(driver.get_current_stream(driver.get_current_device()), in_use)


def run(launches: Iterable[Launch], device: torch.device):
    """Run `launches` in order on the current stream of `device`."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def launched(describe: Callable[..., Iterable[Launch]]) -> Callable[..., None]:
    """Return a function of an operator that runs the launches that `describe` yields for the same arguments.

    Results come first. The caller has checked all arguments and allocated the results; parameters are contiguous.
    """

    def launch(*arguments: Any, **options: Any):
        device = next(argument.device for argument in arguments if argument is not None)
        run(describe(*arguments, **options), device)

    return launch


def named(name: str, launches: Iterable[Launch], options: str = "") -> Iterator[tuple[str, Launch]]:
    """Yield launches with their names, such as "forward 1 gelu", without a number where there is only one."""
    launches = list(launches)
    for number, launch in enumerate(launches):
        yield " ".join(filter(None, (name, str(number) if len(launches) > 1 else "", options))), launch


def specialize(value: Any, path: tuple[int, ...], constexprs: dict, attrs: dict) -> str | tuple:
    """Return the type of an argument, as Triton does at a launch: 1 and None are constants, multiples of 16 known."""
    if isinstance(value, tuple):
        return tuple(specialize(item, (*path, i), constexprs, attrs) for i, item in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor):  # memory itself is aligned; meta tensors have no address to ask for
        offset, kind = value.storage_offset() * value.element_size(), POINTERS[value.dtype]
    else:
        offset, kind = value, integer_type(value)
    if offset % 16 == 0:
        attrs[path] = ALIGNED
    return kind


def integer_type(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def cuobjdump() -> str:
    """Return the path of cuobjdump: Triton's own, or the CUDA toolkit's on PATH."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = shipped if shipped.exists() else shutil.which("cuobjdump")
    if not found:
        raise FileNotFoundError(f"cuobjdump is neither {shipped} nor on PATH")
    return str(found)


def resources(binary: str | Path) -> dict[str, dict[str, Resources]]:
    """Return {"sm_90": {mangled name of a kernel: what it takes, shared memory static only}, ...}.

    `binary` is a cubin (then the architecture is "") or a library or program with CUDA code for some architectures.
    """
    command = [cuobjdump(), "-res-usage", str(binary)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {finished.stderr.strip() or finished.stdout.strip()}")
    return parse_resources(finished.stdout)


def parse_resources(text: str) -> dict[str, dict[str, Resources]]:
    """Read what `cuobjdump -res-usage` prints; see `resources`."""
    found, architecture, name = {}, "", None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.setdefault(architecture, {})[name] = Resources(registers, stack + local, shared)
    return found
