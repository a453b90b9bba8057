"""The whole network on Triton's kernels, in the interpreter or on a GPU: values, gradients, and that they are used."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from helpers.backends import calls, each_kernel, kernels_of, running_on
from helpers.networks import SMALL, T
from helpers.ops import largest_difference
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from seemore_fast import SeemoRe, ops, reference, use_backend
from seemore_fast.kernels.launch import Launch
from seemore_fast.network.gpu_memory import gpu_memory_needed
from seemore_fast.network.replay import ALLOCATIONS, InsideOperators, computes, launching, name_of

each_backend = each_kernel("gated_ffn")
on_triton = pytest.mark.parametrize("backend", [name for name in kernels_of("gated_ffn") if name == "triton"])


@pytest.fixture
def models(device):
    """The plain network and ours, with the same parameters."""
    torch.manual_seed(0)
    config = {**SMALL, "num_layers": 1}
    plain, ours = reference.SeemoRe(**config).to(device), SeemoRe(**config).to(device)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@each_backend
def test_values_and_gradients_are_those_of_the_plain_network(backend, device, models):
    plain, ours = models
    x, target = torch.rand(2, 3, 5, 13, device=device), torch.rand(2, 3, 10, 26, device=device)
    torch.nn.functional.l1_loss(plain(x), target).backward()
    with running_on(backend, device):
        y = ours(x)
        torch.nn.functional.l1_loss(y, target).backward()
    assert largest_difference(y, plain(x).double()) < 1e-5
    for (name, expected), found in zip(plain.named_parameters(), ours.parameters(), strict=True):
        largest = expected.grad.abs().max().item()
        torch.testing.assert_close(
            found.grad,
            expected.grad,
            rtol=1e-3,
            atol=1e-4 * largest + 1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    wanted = {"norm_pointwise", "norm_conv3x3", "gated_ffn", "low_rank_experts", "calibrate", "striped_conv_router"}
    assert wanted <= {operator for name, operator in calls if name == backend}


@each_backend
def test_bfloat16(backend, device, models):
    """As near to float32 as the plain network in bfloat16 is."""
    plain, ours = (model.eval() for model in models)
    x = torch.rand(1, 3, 16, 19, device=device)
    with torch.no_grad(), use_backend("reference"):
        exact, narrow = plain(x).double(), plain.bfloat16()(x)
    with torch.no_grad(), running_on(backend, device):
        y = ours.bfloat16()(x)
    assert y.dtype == torch.float32
    assert largest_difference(y, exact) <= 2 * largest_difference(narrow, exact)


@on_triton
def test_launches_of_a_group(backend, device, monkeypatch):
    """What a call costs the host: counted for two depths, so that both ends of the network cancel out."""
    launched = Counter()
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: launched.update([self.kernel.__name__]) or run(self))
    counts = []
    for depth in (1, 2):
        torch.manual_seed(0)
        model = SeemoRe(**{**SMALL, "num_layers": depth}).to(device).eval().prepare()
        launched.clear()
        with torch.no_grad(), running_on(backend, device):
            model(torch.rand(1, 3, 16, 16, device=device))
        counts.append(launched.copy())
    assert (counts[1] - counts[0]).total() == 19


@each_kernel("conv3x3_shuffle")
def test_the_last_convolution_is_fused_under_autocast(backend, device):
    """It is float32 there, too: one kernel, and the result to the bit."""
    x, weight, bias, mean = torch.rand(1, 4, 5, 6), torch.rand(12, 4, 3, 3), torch.rand(12), torch.rand(1, 3, 1, 1)
    tensors = [t.to(device) for t in (x, weight, bias, mean)]
    with torch.no_grad(), running_on(backend, device):
        expected = ops.conv3x3_shuffle(*tensors, scale=2)
        calls.clear()
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(ops.conv3x3_shuffle(*tensors, scale=2), expected)
    assert (backend, "conv3x3_shuffle") in calls


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_gradients_under_autocast(backend, device, models, dtype):
    """All of them together, and the result, are at most twice as far from float64 as the plain network's."""
    plain, ours = models
    x = torch.rand(2, 3, 5, 13, device=device)

    def step(network, x, cast):
        network.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=cast):
            y = network(x)
        y.square().mean().backward()
        return y.detach().double(), torch.cat([p.grad.double().flatten() for p in network.parameters()])

    exact = step(copy.deepcopy(plain).double(), x.double(), False)
    with use_backend("reference"):
        narrow = step(plain, x, True)
    with running_on(backend, device):
        found = step(ours, x, True)
    for one, other, truth in zip(found, narrow, exact, strict=True):
        assert (one - truth).norm() <= 2 * (other - truth).norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.slow
@each_backend
def test_as_any_module(backend, device, models):
    """Data-parallel, averaged weights, accumulation, one frozen parameter: gradients as without all that."""
    ours, x = models[1], torch.rand(2, 3, 16, 17, device=device)
    ours.body[0].local_block.block.proj.weight.requires_grad_(False)
    kind = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(kind, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with running_on(backend, device):
            for half in x:
                (ours(half[None]).square().mean() / 2).backward()
            expected = [p.grad for p in ours.parameters()]
            ours.zero_grad()
            wrapped = torch.nn.parallel.DistributedDataParallel(ours)
            average = torch.optim.swa_utils.AveragedModel(ours)
            with wrapped.no_sync():
                (wrapped(x[:1]).square().mean() / 2).backward()
            (wrapped(x[1:]).square().mean() / 2).backward()
            average.update_parameters(ours)
            assert torch.equal(average.module.eval()(x), ours.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip((p.grad for p in ours.parameters()), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


class Peak(InsideOperators):
    """Adds up the storages that live at the same time, those inside of operators, too."""

    def __init__(self):
        super().__init__()
        self._live, self.now, self.most = {}, 0, 0

    def measure(self, call, x):
        """Return how many bytes lived at most during call(x)."""
        with self, launching().observed(self._launch):
            call(x)
        return self.most

    def _launch(self, launch):
        with _disable_current_modes():  # the interpreter's own memory is none of the GPU's
            launch.start()
        del launch
        gc.collect()  # the interpreter leaves cycles with the tensors that it was given

    def see(self, function, arguments, options):
        results = function(*arguments, **options)
        is_view = not computes(function) and name_of(function) not in ALLOCATIONS  # of a weight, say
        for tensor in () if is_view else filter(torch.is_tensor, tree_leaves(results)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return results

    def _free(self, key):
        self.now -= self._live.pop(key, 0)


@on_triton
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_memory_of_a_call(backend, device, dtype):
    """It is what `gpu_memory_needed` tells, with all workspaces, and much less than the plain network's."""
    torch.manual_seed(0)
    with running_on(backend, device):
        model = SeemoRe(**{**T, "scale": 4, "num_layers": 1}).to(device, dtype).eval().prepare()
    # Wider than planes whose stripes are one launch, which has no float32 image in between.
    x, plain = torch.rand(1, 3, 20, 72, device=device), reference.SeemoRe(**model.config).to(device, dtype).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(), running_on(backend, device):
        ours = Peak().measure(model, x)
    with torch.no_grad(), use_backend("reference"):
        theirs = Peak().measure(plain, x)
    told = gpu_memory_needed(model, x.shape)
    assert 0.9 * told <= ours <= told
    assert ours < {torch.float32: 0.6, torch.bfloat16: 0.42}[dtype] * theirs
