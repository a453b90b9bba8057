"""The whole network: against the published one, in every mode, configuration and use."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from helpers.networks import SMALL, T, route_apart

from seemore_fast import SeemoRe, reference, seemore_b, seemore_l, seemore_t

PRESETS = {"t": seemore_t, "b": seemore_b, "l": seemore_l}
SIZES = [(16, 16), (17, 23), (64, 64), (97, 131), (180, 320)]
PARAMETERS = {
    "t": (220_104, 224_979, 231_804),
    "b": (490_364, 496_859, 505_952),
    "l": (953_308, 959_803, 968_896),
}
CONFIGURATIONS = {
    "linear ranks, 2 of 6": dict(num_experts=6, lr_space="linear", topk=2),
    "double ranks": dict(num_experts=4, lr_space="double"),
    "no shuffle": dict(use_shuffle=False),
    "recursive 1": dict(recursive=1),
    "kernel 7": dict(global_kernel_size=7),
    "one expert": dict(num_experts=1),
    "range 255": dict(img_range=255.0),
}


def pair(oracle, device, **config):
    """Return the published module and ours with the same weights, biases and LayerNorms away from their defaults."""
    theirs = oracle(**config).to(device)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.mean = theirs.mean.to(device)
    ours = SeemoRe(**config).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("sides", [SIZES[1:3], pytest.param(SIZES, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", "tbl")
@torch.no_grad()
def test_presets_equal_the_published_network(oracle, device, size, scale, sides):
    theirs, ours = pair(oracle, device, **PRESETS[size](scale).config)
    for height, width in sides:
        x = torch.rand(1, 3, height, width, device=device)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", [SeemoRe, reference.SeemoRe])
@pytest.mark.parametrize("change", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.no_grad()
def test_configurations_equal_the_published_network(oracle, device, change, model_class):
    config = {**SMALL, **change}
    theirs, ours = pair(oracle, device, **config)
    plain = model_class(**config).to(device).eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 33, 50, device=device)
    torch.testing.assert_close(plain(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", "tbl")
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        models = [PRESETS[size](scale) for scale in (2, 3, 4)]
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == PARAMETERS[size]


def test_state_dict_keys_are_the_published_ones(oracle):
    expected = {name: tensor.shape for name, tensor in oracle(**SMALL).state_dict().items()}
    assert {name: tensor.shape for name, tensor in SeemoRe(**SMALL).state_dict().items()} == expected


@pytest.mark.parametrize("topk", [1, 2])
def test_training_equals_the_dense_published_path(oracle, device, topk):
    theirs, ours = pair(oracle, device, **{**SMALL, "topk": topk})
    x = torch.rand(3, 3, 20, 24, device=device)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs, y_ours = theirs.train()(x_theirs), ours.train()(x_ours)
    torch.testing.assert_close(y_ours, y_theirs, rtol=0, atol=1e-5)
    cotangent = torch.randn_like(y_ours)
    y_theirs.backward(cotangent)
    y_ours.backward(cotangent)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-4)
    for (name, p_ours), p_theirs in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = p_theirs.grad.abs().max().item()
        assert p_ours.grad is not None, f"{name} has no gradient: optimizers and DDP see the difference"
        torch.testing.assert_close(p_ours.grad, p_theirs.grad, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)


def test_experts_that_nobody_chose_get_zero_gradients(small_model):
    small_model.train()(torch.rand(1, 3, 16, 16, device=small_model.mean.device)).sum().backward()
    for group in small_model.body:
        grads = [expert.conv_1.weight.grad for expert in group.local_block.block.moe_layer.experts]
        assert sum(bool(grad.any()) for grad in grads) == 1


@torch.no_grad()
def test_batch_equals_single_images(small_model, device):
    x = torch.rand(4, 3, 24, 40, device=device) * torch.tensor([0.1, 1, 0.5, 2], device=device)[:, None, None, None]
    assert len(route_apart(small_model, x).unique()) > 1, "the case must have images that route differently"
    single = torch.cat([small_model(image[None]) for image in x])
    torch.testing.assert_close(small_model(x), single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (15, 16), (16, 5), (3, 3)])
@torch.no_grad()
def test_small_images_are_extended_and_cropped_back(small_model, device, size):
    x = torch.rand(2, 3, *size, device=device)
    height, width = max(16, size[0]), max(16, size[1])
    rows = torch.arange(height).clamp(max=size[0] - 1)
    columns = torch.arange(width).clamp(max=size[1] - 1)
    extended = small_model(x[:, :, rows][:, :, :, columns])
    y = small_model(x)
    assert y.shape == (2, 3, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(y, extended[:, :, : 2 * size[0], : 2 * size[1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
@torch.no_grad()
def test_other_channel_counts(device, in_chans):
    config = {**SMALL, "in_chans": in_chans}
    ours, plain = SeemoRe(**config).to(device).eval(), reference.SeemoRe(**config).to(device).eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(1, in_chans, 20, 20, device=device)
    assert not ours.mean.any()
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-5)


def test_float64_is_computed_in_float64(small_model, device):
    model = copy.deepcopy(small_model).double()
    x = torch.rand(1, 3, 18, 18, device=device, dtype=torch.float64)
    plain = reference.SeemoRe(**SMALL).to(device, torch.float64)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["to", "autocast"])
@torch.no_grad()
def test_reduced_precision_returns_float32_near_the_full_one(small_model, device, dtype, how):
    x = torch.rand(1, 3, 32, 32, device=device)
    full = small_model(x)
    if how == "to":
        y = copy.deepcopy(small_model).to(dtype)(x)
    else:
        with torch.autocast(device, dtype):
            y = small_model(x)
    assert y.dtype == torch.float32
    error = (y - full).abs().max().item()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)
    assert error > 0 or device == "cpu"  # where float32 is as fast


@torch.no_grad()
def test_autocast_leaves_float64_alone(small_model, device):
    model = copy.deepcopy(small_model).double()
    x = torch.rand(1, 3, 16, 16, device=device, dtype=torch.float64)
    with torch.autocast(device, torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=1e-12)


def test_half_precision_does_not_overflow(device):
    model = SeemoRe(**SMALL).to(device)
    with torch.no_grad():
        model.conv_1.weight *= 2000  # features in the thousands: their squares are no float16
    assert model.half()(torch.rand(1, 3, 16, 16, device=device)).isfinite().all()


@torch.no_grad()
def test_layouts_and_views_give_the_same(small_model, device):
    wide = torch.rand(2, 3, 24, 60, device=device)
    x = wide[:, :, :, 7:47]
    expected = small_model(x.contiguous())
    for other in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(small_model(other), expected, rtol=0, atol=1e-6)


def test_the_input_is_not_changed(small_model, device):
    x = torch.rand(1, 3, 16, 16, device=device)
    before = x.clone()
    small_model.train()(x).sum().backward()
    assert torch.equal(x, before)


def test_empty_batch(small_model, device):
    assert small_model(torch.rand(0, 3, 20, 20, device=device)).shape == (0, 3, 40, 40)


def parts_to_customise(model):
    block = model.body[0].local_block.block
    return {
        "rme": model.body[0].local_block,
        "ffn": model.body[0].global_block.ffn,
        "leaf": model.body[1].global_block.ffn.fn_1[0],
        "striped": model.body[1].global_block.block.attn.conv[1],
        "calibrate": block.conv[0],
        "expert": block.moe_layer.experts[0].conv_1,
        "router": block.moe_layer.gate,
        "router layer": block.moe_layer.gate.body[2],
    }


@pytest.mark.parametrize("part", parts_to_customise(SeemoRe(**SMALL)))
def test_hooks_run_and_change_nothing(small_model, device, part):
    x = torch.rand(2, 3, 20, 20, device=device)
    expected = small_model(x)
    calls = []
    parts_to_customise(small_model)[part].register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(small_model(x), expected, rtol=0, atol=1e-5)
    assert calls


def test_what_a_hook_returns_is_used(small_model, device):
    x = torch.rand(1, 3, 20, 20, device=device)
    expected = small_model(x)
    handle = small_model.body[0].local_block.ffn.gate.register_forward_hook(lambda module, args, out: 0 * out)
    assert (small_model(x) - expected).abs().max() > 1e-4
    handle.remove()
    torch.testing.assert_close(small_model(x), expected, rtol=0, atol=0)


def test_replaced_and_parametrised_submodules_run(small_model, device):
    x = torch.rand(1, 3, 20, 20, device=device)
    expected = small_model(x)
    relu = copy.deepcopy(small_model)
    relu.body[0].global_block.ffn.fn_1[1] = nn.ReLU()
    assert (relu(x) - expected).abs().max() > 1e-4
    negated = copy.deepcopy(small_model)

    class Negate(nn.Module):
        def forward(self, weight):
            return -weight

    conv = negated.body[0].global_block.block.proj
    nn.utils.parametrize.register_parametrization(conv, "weight", Negate())
    assert (negated(x) - expected).abs().max() > 1e-4
    nn.utils.parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    torch.testing.assert_close(negated(x), expected, rtol=0, atol=1e-5)


class Shifted(nn.Module):
    """A wrapper such as LoRA's: the layer's result and something of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + torch.arange(self.layer(x).shape[1], device=x.device).view(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("part", ["conv_1", "conv_3", "router"])
def test_replaced_experts_and_routers_run(device, part):
    model = SeemoRe(**{**SMALL, "topk": 3}).to(device).eval()
    x = torch.rand(2, 3, 20, 20, device=device)
    expected = model(x)
    moe = model.body[0].local_block.block.moe_layer
    if part == "router":
        moe.gate.body[2] = Shifted(moe.gate.body[2])
    else:
        setattr(moe.experts[1], part, Shifted(getattr(moe.experts[1], part)))
    assert (model(x) - expected).abs().max() > 1e-4


def test_changed_eps_is_used(small_model, device):
    plain = reference.SeemoRe(**SMALL).to(device)
    plain.load_state_dict(small_model.state_dict())
    x = torch.rand(1, 3, 20, 20, device=device)
    for model in (small_model, plain):
        model.body[0].local_block.norm_1.eps = 0.5
    torch.testing.assert_close(small_model(x), plain(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_independent(small_model, device, duplicate):
    x = torch.rand(1, 3, 20, 20, device=device)
    expected = small_model(x)
    other = duplicate(small_model)
    assert other.body[0].local_block.is_unmodified()
    with torch.no_grad():
        for parameter in small_model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_changed_parameters_are_seen_at_the_next_call(small_model, device):
    x = torch.rand(1, 3, 20, 20, device=device)
    with torch.inference_mode():
        before = small_model(x)
        small_model.body[0].global_block.block.proj.weight.data.mul_(-1)
        assert (small_model(x) - before).abs().max() > 1e-5


@pytest.mark.parametrize("model_class", [SeemoRe, reference.SeemoRe])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_to_one_graph(device, model_class, mode):
    model = model_class(**{**SMALL, "num_layers": 1}).to(device).train(mode == "train")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3, 20, 28, device=device)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


BAD_CONFIGURATIONS = [
    (dict(scale=0), "scale is 0"),
    (dict(topk=4), "topk is 4"),
    (dict(lr_space=1), "lr_space is 1"),
    (dict(global_kernel_size=10), "global_kernel_size is 10"),
    (dict(img_range=0), "img_range is 0"),
    (dict(recursive=0), "recursive is 0"),
    (dict(embedding_dim=3.5), "embedding_dim is 3.5"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGURATIONS)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SeemoRe(**{**T, **change})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(3, 16, 16), ValueError, r"shape \(3, 16, 16\), expected \(B, 3, H, W\)"),
        (torch.rand(1, 4, 16, 16), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8.*float"),
        (torch.rand(1, 3, 0, 16), ValueError, "at least 1"),
        ([[1.0]], TypeError, "is a list"),
    ],
)
def test_bad_inputs_are_refused(small_model, x, error, message):
    with pytest.raises(error, match=message):
        small_model(x)


def test_an_image_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"x is on meta, expected cpu, where the model is: move one of them"):
        SeemoRe(**SMALL)(torch.empty(1, 3, 20, 20, device="meta"))
