"""What only a GPU can show of the kernels: streams, graphs, huge tensors, nobody waiting. With --device cuda.

That their results are right on a GPU, too, is what the tests of the operators find with --device cuda.
"""

import pytest
import torch
from helpers.gpu import CALLS, HUGE, Call, huge_tensors
from helpers.ops import LAYOUTS
from torch import Tensor

from seemore_fast import backends, reference, use_backend

pytestmark = pytest.mark.gpu


SHAPE = (3, 36, 130, 147)


def backends_of(operator: str) -> list[str]:
    """Return the GPU's backends that have an operator; pointwise is a norm_pointwise without norm."""
    stem = "norm_pointwise" if operator == "pointwise" else operator
    return [kernel.backend for kernel in backends.KERNELS[stem] if kernel.device == "cuda"]


USES = [(name, backend) for name, call in CALLS.items() for backend in backends_of(call.operator)]


@pytest.fixture(params=USES, ids=" ".join)
def call(request):
    """A use of an operator, on one of the backends that have a kernel of it; the test runs on that."""
    name, backend = request.param
    if backends.unsupported_reason(backend):
        pytest.skip(backends.unsupported_reason(backend))
    with use_backend(backend):
        yield CALLS[name]


def assert_equal(found: list[Tensor], expected: list[Tensor]):
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {number} differs"


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float):
    """Compare with float64: an index or an offset gone wrong is far off, and rounding is not the question."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.is_floating_point():
            atol = tolerance * max(other.abs().max().item(), 1e-30)
            torch.testing.assert_close(
                one.double().cpu(),
                other.double().cpu(),
                rtol=tolerance,
                atol=atol,
                msg=lambda text, number=number: f"result {number}: {text}",
            )


@pytest.mark.parametrize("layout", [None, "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_shapes(call, device, dtype, layout):
    """All kernels once or twice, for compute-sanitizer, under which everything takes long; nothing else runs there."""
    tensors = call.tensors("cpu", dtype, (2, 5, 21, 70))
    expected = call.both({name: t.double() for name, t in tensors.items()}, reference)
    if layout:
        tensors = {name: LAYOUTS[layout](t) for name, t in tensors.items()}
    found = call.both({name: t.to(device) for name, t in tensors.items()})
    assert_near(found, expected, {torch.float32: 1e-4, torch.bfloat16: 2**-5}[dtype])


def test_another_stream(call, device):
    """The inputs arrive late on a stream of its own: what runs on any other sees NaN."""
    tensors = call.tensors(device, torch.float32, SHAPE)
    expected = call.both(tensors)
    late = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, tensor in late.items():
            tensor.copy_(tensors[name])
        found = call.both(late)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(call, device, dtype, part):
    """A graph captured with some data gives what eager gives, bit for bit, with other data in the same buffers."""
    run = getattr(call, part)
    sets = [call.tensors(device, dtype, SHAPE, seed) for seed in (0, 1)]
    buffers = {name: t.clone() for name, t in sets[0].items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(buffers)  # loads kernels, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(buffers)
    for tensors in reversed(sets):
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name])
        graph.replay()
        assert_equal(found, run(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_equal(call, device, dtype):
    """With blocks on all multiprocessors, while another stream has work, too."""
    tensors = call.tensors(device, dtype, (4, 36, 257, 259))
    expected, stream = call.both(tensors), torch.cuda.Stream()
    matrix = torch.rand(2048, 2048, device=device)
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(stream):
            matrix @ matrix
        assert_equal(call.both(tensors), expected)
    stream.synchronize()


def test_nobody_waits_for_the_gpu(call, device):
    """With a tenth of a second of other work queued, calls return; torch itself finds no synchronisation either."""
    tensors = call.tensors(device, torch.float32, SHAPE)
    call.both(tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        call.both(tensors)
        is_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_busy, "the queue is empty: something waited for it"


def test_another_device(call):
    """Tensors of a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = call.both(call.tensors("cuda:0", torch.float32, SHAPE))
    with torch.cuda.device(0):
        found = call.both(call.tensors("cuda:1", torch.float32, SHAPE))
    assert all(t.device.index == 1 for t in found)
    assert_near(found, [t.double() for t in expected], 1e-4)


def check_corners(call: Call, device: str, shape: tuple[int, ...]):
    """Compare the first and the last pixels of large images with the reference on crops.

    upstream is zero elsewhere, and so far inside of the crops that they see all that matters: the parameters'
    gradients are those of the crops, too. Crops are aligned to calibrate's small map.
    """
    size, margin = 192, 64
    tensors = huge_tensors(call, device, shape)

    def crops(image: Tensor) -> Tensor:
        return torch.cat([image[..., :size, :size], image[..., -size:, -size:]])

    inside = torch.zeros(2, 1, size, size, dtype=torch.bool, device=device)
    inside[0, :, :-margin, :-margin] = inside[1, :, margin:, margin:] = True
    images = [*call.images, "upstream"]
    tensors["upstream"] = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    for corner, where in zip(inside, (slice(size), slice(-size, None)), strict=True):
        values = torch.randn(1, shape[1], size, size, device=device) * corner
        tensors["upstream"][..., where, where] = values.to(torch.bfloat16)
    cropped = {name: (crops(t) if name in images else t).double() for name, t in tensors.items()}
    y, *gradients = call.both(cropped, reference)
    found_y, *found = call.both(tensors)
    assert_near([crops(found_y) * inside], [y * inside], 2**-6)
    assert_near([crops(t) if t.shape == shape else t for t in found], gradients, 2**-6)


def check_huge_router(call: Call, device: str, shape: tuple[int, ...]):
    """Compare with the reference on the means, which are summed up channel by channel."""
    tensors = huge_tensors(call, device, shape)
    for channel, image in enumerate(tensors["a"][0]):  # means that differ, the last ones most
        image += channel / 16
    means = torch.stack([image.mean(dtype=torch.float64) for image in tensors["a"][0]])[None, :, None, None]
    wide = {name: t.double() for name, t in tensors.items() if name != "a"}
    index, probability, dmeans, dweight = call.both({"a": means, **wide}, reference)
    found_index, found_probability, da, found_dweight = call.both(tensors)
    assert torch.equal(found_index, index)
    assert_near([found_probability], [probability], 1e-4)
    corners = torch.cat([da[..., :3, :3], da[..., -3:, -3:]])
    assert_near([corners], [(dmeans / means.new_tensor(shape[2:]).prod()).expand_as(corners)], 2**-6)
    assert_near([found_dweight], [dweight], 2**-6)


def test_more_than_2_to_31_elements(call, device):
    if call.operator == "striped_conv_router":
        pytest.skip("it is striped_conv's walk and router's second step, of which each has its own")
    if call.operator == "router":
        check_huge_router(call, device, HUGE)
    else:
        check_corners(call, device, HUGE)
