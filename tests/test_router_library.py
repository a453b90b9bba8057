"""router's raw operators: those of the libraries, called directly as fused blocks do. Values: test_router.py."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import cuda_host
from helpers.backends import kernels_of, running_on
from helpers.ops import LAYOUTS, cast, random_parameters, value_and_gradients
from helpers.router import tensors_of, weight_of

from seemore_fast import reference
from seemore_fast.ops.router import router

each_library = pytest.mark.parametrize(
    "backend", [backend for backend in kernels_of("router", False) if backend != "triton"]
)


def library_of(backend):
    return getattr(torch.ops, f"seemore_{backend.split()[0]}")


def room(shape, dtype, device):
    """Room for a result, in a larger tensor of a value that nothing computes here."""
    storage = torch.full((math.prod(shape) + 32,), 77, dtype=dtype, device=device)
    return storage, storage[16:-16].view(shape)


def raw_arguments(device, backward=False, sums=False, batch=2, dtype=torch.float32):
    """Arguments of an operator by name, results first, and the storages that these lie in."""
    channels, experts, top_k, parts = 3, 4, 2, 5
    tensors = cast(tensors_of(device, (batch, channels, 6, 7), experts), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    decision = {
        "expert_index": ((batch, top_k), torch.int64),
        "expert_weight": ((batch, top_k), wide),
        "mean": ((batch, channels), wide),
        "probability": ((batch, experts), wide),
    }
    image = {"dmean": ((batch, channels), wide)} if sums else {"da": ((batch, channels, 6, 7), dtype)}
    results = image | {"dweight": ((experts, channels), dtype)} if backward else decision
    storages, arguments = {}, {}
    for name, (shape, kind) in results.items():
        storages[name], arguments[name] = room(shape, kind, device)
    if backward:
        chosen = torch.arange(top_k, device=device).expand(batch, top_k).contiguous()
        arguments |= {
            "dexpert_weight": torch.ones(batch, top_k, dtype=wide, device=device),
            "expert_index": chosen,
            "mean": torch.ones(batch, channels, dtype=wide, device=device),
            "probability": torch.full((batch, experts), 1 / experts, dtype=wide, device=device),
            "weight": tensors["weight"],
        }
    elif sums:
        partial = torch.ones(parts, batch, channels, dtype=wide, device=device)
        arguments |= {"partial": partial, "weight": tensors["weight"], "pixels": 42, "top_k": top_k}
    else:
        arguments |= tensors | {"top_k": top_k}
    return arguments, storages


RAW = {
    "router": {},
    "router_backward": {"backward": True},
    "router_from_sums": {"sums": True},
    "router_from_sums_backward": {"backward": True, "sums": True},
}
each_raw = pytest.mark.parametrize("name", RAW)


@each_library
@each_raw
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_raw_operators_write_all_of_their_results_and_nothing_else(backend, device, name, dtype, batch):
    with running_on(backend, device):
        arguments, storages = raw_arguments(device, **RAW[name], batch=batch, dtype=dtype)
        getattr(library_of(backend), name)(*arguments.values())
    for result, storage in storages.items():
        assert (storage[:16] == 77).all() and (storage[-16:] == 77).all(), f"wrote beside {result}"
        assert not (storage[16:-16] == 77).any(), f"{result} is not written whole"


@each_library
def test_sums_of_parts(backend, device):
    """As an operator that pools on its way leaves them: any number of parts, added up in their order."""
    for parts in (1, 2, 100):
        sums = random_parameters({"partial": (parts, 3, 5), "weight": (4, 5)}, device)
        with running_on(backend, device):
            mean = sums["partial"].sum(dim=0) / 42
            index, weight = router(mean[:, :, None, None], sums["weight"], 4)
            results = [
                torch.empty_like(index),
                torch.empty_like(weight),
                weight.new_empty(3, 5),
                weight.new_empty(3, 4),
            ]
            library_of(backend).router_from_sums(*results, *sums.values(), 42, 4)
        assert torch.equal(results[0], index)
        torch.testing.assert_close(results[1], weight)
        torch.testing.assert_close(results[2], sums["partial"].sum(dim=0) / 42)
        torch.testing.assert_close(results[3].gather(1, index), weight)


def narrower(x):
    return x[..., :-1].contiguous()


def other_dtype(x):
    return x.to(torch.int32)


def scattered(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


RAW_FAULTS = [
    ("router", "a", lambda a: a[0], r"router: a has 3 dimensions, expected 4: \(B, C, H, W\)"),
    ("router", "a", other_dtype, "router: a has another dtype, expected float32, float64, float16 or bfloat16"),
    ("router", "a", lambda a: a[:, :, :0], "router: a has no pixels, expected at least one"),
    ("router", "a", lambda a: a.double(), "expert_weight has another dtype, expected float64"),
    ("router", "top_k", lambda k: 3, r"expert_index has shape \(2, 2\), expected \(2, 3\)"),
    ("router", "top_k", lambda k: 0, "top_k is 0, expected 1 to 4"),
    ("router", "top_k", lambda k: 5, "top_k is 5, expected 1 to 4"),
    ("router", "weight", lambda w: w[0], r"weight has shape \(3\), expected \(1, 3\)"),
    ("router", "weight", lambda w: w[:0], "weight has no elements, expected at least one expert and channel"),
    ("router_from_sums", "partial", lambda x: x[0], r"partial has 2 dimensions, expected 3: \(parts, B, C\)"),
    ("router_from_sums", "partial", lambda x: x.half(), "partial has another dtype, expected float32 or float64"),
    ("router_from_sums", "partial", scattered, "partial is not contiguous"),
    ("router_from_sums", "pixels", lambda n: 0, "pixels is 0, expected at least 1"),
    ("router_from_sums", "mean", lambda x: None, "mean is None, expected a tensor: partial has no means"),
    ("router_from_sums_backward", "dmean", lambda x: x.half(), "dmean has another dtype, expected float32 or float64"),
]


@each_library
@pytest.mark.parametrize("name, argument, spoil, message", RAW_FAULTS)
def test_raw_operators_refuse(backend, device, name, argument, spoil, message):
    with running_on(backend, device):
        arguments, _ = raw_arguments(device, **RAW[name])
        arguments[argument] = spoil(arguments[argument])
        with pytest.raises(RuntimeError, match=message):
            getattr(library_of(backend), name)(*arguments.values())


@each_library
@each_raw
@pytest.mark.parametrize(
    "spoil, message",
    [
        (narrower, "has shape"),
        (other_dtype, "has another dtype"),
        (scattered, "is not contiguous"),
        (lambda x: x.to("meta"), "is on another (kind of )?device"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_raw_operators_name_the_tensor(backend, device, name, spoil, message):
    """Each tensor in turn, but images where they may be of another width or of any strides."""
    free = {narrower: ["a", "da"], scattered: ["a", "da", "dexpert_weight"]}.get(spoil, [])
    with running_on(backend, device):
        given, _ = raw_arguments(device, **RAW[name])
        for argument, value in given.items():
            if not isinstance(value, torch.Tensor) or argument in free:
                continue
            with pytest.raises(RuntimeError, match=rf"router: \w+ {message}"):
                getattr(library_of(backend), name)(*(given | {argument: spoil(value)}).values())


# On the host alone


def host_library(**options):
    try:
        return cuda_host.library(**options)
    except cuda_host.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("layout", [None, "channels_last", "slice"])
def test_threads_in_any_order(monkeypatch, layout):
    host_library()
    tensors = cast(tensors_of("cpu", (2, 20, 30, 36)), torch.bfloat16)
    if layout:
        tensors["a"] = LAYOUTS[layout](tensors["a"])
    results = []
    with running_on("cuda_host", "cpu"):
        for order in ("forward", "backward", "shuffled"):
            monkeypatch.setenv("CUDA_HOST_ORDER", order)
            results.append(value_and_gradients(weight_of(router), tensors))
    for what, value in results[0].items():
        assert value.isfinite().all(), what
        assert all(torch.equal(value, other[what]) for other in results[1:]), what


def cut(x):
    """The same by its shape, but its memory ends before its last element."""
    x = x.clone()
    x.untyped_storage().resize_((x.numel() - 1) * x.element_size())
    return x


def run_sanitized(path: str, short: str) -> None:
    """In a process of its own. `short` names a tensor whose memory is to be too short."""
    torch.ops.load_library(path)
    operators = torch.ops.seemore_cuda_host
    for layout in (None, "channels_last", "slice"):
        for shape in [(2, 3, 17, 33), (1, 4, 16, 32), (0, 2, 3, 4), (1, 1, 1, 1), (2, 36, 5, 7), (1, 1, 1, 9001)]:
            for dtype in (torch.float32, torch.bfloat16):
                tensors = cast(tensors_of("cpu", shape, experts=4), dtype)
                tensors["a"] = LAYOUTS[layout](tensors["a"]) if layout else tensors["a"]
                batch, channels = shape[:2]
                tensors |= {
                    "expert_index": torch.empty(batch, 2, dtype=torch.int64),
                    "expert_weight": torch.empty(batch, 2),
                    "mean": torch.empty(batch, channels),
                    "probability": torch.empty(batch, 4),
                    "dexpert_weight": torch.ones(batch, 2),
                    "da": torch.empty_like(tensors["a"]),
                    "dweight": torch.empty_like(tensors["weight"]),
                }
                truth = reference.router(tensors["a"], tensors["weight"], 2)
                if short:
                    tensors[short] = cut(tensors[short])
                names = ("expert_index", "expert_weight", "mean", "probability", "a", "weight")
                operators.router(*(tensors[name] for name in names), 2)
                torch.testing.assert_close(tensors["expert_weight"], truth[1], rtol=1e-5, atol=1e-5)
                names = ("da", "dweight", "dexpert_weight", "expert_index", "mean", "probability", "weight")
                operators.router_backward(*(tensors[name] for name in names))
    print("clean")


SHORT = ["a", "da", "expert_index", "expert_weight", "mean", "probability", "weight", "dweight", "dexpert_weight"]


@pytest.mark.parametrize("short", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in SHORT)])
def test_under_address_sanitizer(short):
    """It is clean; and not because nothing is ever found: where a tensor is too short, that is reported."""
    path = host_library(sanitize=True)
    code = "import sys, test_router_library; test_router_library.run_sanitized(*sys.argv[1:])"
    finished = subprocess.run(
        [sys.executable, "-c", code, path, short],
        capture_output=True,
        text=True,
        env=cuda_host.asan_environment(),
        cwd=Path(__file__).parent,
    )
    if short:
        assert "heap-buffer-overflow" in finished.stderr
        assert finished.returncode != 0
    else:
        assert (finished.stdout, finished.returncode) == ("clean\n", 0), finished.stderr
