"""When the model is computed by the fused network, and that its weights are never stale."""

import copy
import pickle
import re
import threading
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from helpers import CSRC
from helpers.networks import SMALL, network
from torch._dynamo.backends.common import aot_autograd

from seemore_fast import SeemoRe, backends, use_backend
from seemore_fast.network import engine

pytestmark = pytest.mark.skipif(backends.unsupported_reason("cpu") is not None, reason="no CPU library")


@pytest.fixture
def calls(monkeypatch):
    """The engine's calls, as they come."""
    made, run = [], engine.run
    monkeypatch.setattr(engine, "run", lambda model, x: made.append(x) or run(model, x))
    return made


def fresh(model) -> SeemoRe:
    """Return a new model with the weights that `model` has now."""
    other = SeemoRe(**model.config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    other.mean = model.mean  # as a conversion has rounded it
    return other


# When it is chosen


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen parameters", "autocast"])
def test_it_serves_inference_without_being_asked(calls, how):
    model, x = SeemoRe(**SMALL).eval(), torch.rand(1, 3, 20, 20)
    if how == "frozen parameters":
        assert not model.requires_grad_(False)(x).requires_grad
    elif how == "autocast":
        with torch.no_grad(), torch.autocast("cpu"):
            model(x)
    else:
        with getattr(torch, how)():
            model(x)
    assert len(calls) == 1


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_model", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_it_serves_narrow_types_and_returns_float32(calls, of_x, of_model):
    model, x = network().to(of_model), torch.rand(1, 3, 20, 20).to(of_x)
    y = model(x)
    assert len(calls) == 1 and y.dtype == torch.float32
    if of_model != torch.bfloat16 or "bf16" not in engine.native.instruction_set():
        torch.testing.assert_close(y, copy.deepcopy(model).float()(x.float()), rtol=0, atol=1e-6)


def replace_a_layer(model):
    model.body[0].global_block.ffn.fn_1[1] = nn.ReLU()


def add_a_hook(model):
    model.body[1].global_block.block.attn.conv[0].register_forward_hook(lambda module, inputs, y: 2 * y)


def replace_the_hooks(model):
    model.body[1].global_block.block.proj._forward_hooks = OrderedDict({0: lambda module, inputs, y: 2 * y})


def reorder_layers(model):
    layers = model.body[0].local_block.block.conv_2  # stripes and GELU
    layers._modules["0"] = layers._modules.pop("0")


def parametrise(model):
    class Negate(nn.Module):
        def forward(self, weight):
            return -weight

    nn.utils.parametrize.register_parametrization(model.conv_2, "weight", Negate())


def override_forward(model):
    model.upsampler.forward = lambda x: nn.Sequential.forward(model.upsampler, 2 * x)


def choose_more_experts(model):
    model.body[0].local_block.block.moe_layer.gate.top_k = 2


def recurse_less(model):
    model.body[0].local_block.block.recursive = 1


def widen_eps(model):
    model.norm.eps = 0.5


def add_a_parameter(model):
    model.body[0].scale = nn.Parameter(torch.ones(3), requires_grad=False)


def subclass(model):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model.conv_1.__class__ = Doubled


CHANGES = [
    replace_a_layer,
    reorder_layers,
    add_a_hook,
    replace_the_hooks,
    parametrise,
    override_forward,
    choose_more_experts,
    recurse_less,
    widen_eps,
    add_a_parameter,
    subclass,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_models_are_computed_as_they_are(calls, change):
    model, x = network(), torch.rand(2, 3, 20, 20)
    before = model(x)
    for frozen in (False, True):
        if frozen:
            model.prepare()
        else:
            change(model)
        assert "not one that the model was built with" in engine.unsupported_reason(model, x)
        y = model(x)
        with use_backend("reference"):
            torch.testing.assert_close(y, model(x), rtol=0, atol=1e-5)
        assert (change is add_a_parameter) == torch.allclose(y, before, rtol=0, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "duplicate", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_changes_after_preparation_and_of_copies_are_seen(change, duplicate):
    model, x = duplicate(network().prepare()), torch.rand(1, 3, 20, 20)
    assert engine.unsupported_reason(model, x) is None
    change(model)
    assert "not one that the model was built with" in engine.unsupported_reason(model, x)


@pytest.mark.parametrize("prepared", [False, True])
def test_other_parameters_are_seen(prepared):
    model, x = network(), torch.rand(1, 3, 20, 20)
    if prepared:
        model.prepare()
    for weight, reason in (
        (torch.ones(7), "not one that the model was built with"),
        (torch.ones(12).half(), "one dtype"),
    ):
        model.norm.weight = nn.Parameter(weight, requires_grad=False)
        assert reason in engine.unsupported_reason(model, x)


def test_a_hook_on_the_model_itself_runs_around_it(calls):
    model, seen = network(), []
    model.register_forward_hook(lambda module, inputs, y: seen.append(y))
    assert torch.equal(model(torch.rand(1, 3, 20, 20)), seen[0])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (lambda model, x: (model.train(), x), "training mode"),
        (lambda model, x: (model.requires_grad_(True), x), "gradients are wanted"),
        (lambda model, x: (model, x.requires_grad_()), "gradients are wanted"),
        (lambda model, x: (model.double(), x), "the parameters are not all of one dtype"),
        (lambda model, x: (model.double(), x.double()), "x is not float32"),
        (lambda model, x: (model, x.double()), "x is not float32"),
        (lambda model, x: (model, x.to("meta")), "the library for x's device is not there"),
    ],
)
def test_reasons_not_to_serve(situation, reason):
    assert reason in engine.unsupported_reason(*situation(network(), torch.rand(1, 3, 20, 20)))


def test_the_reference_is_run_where_it_is_chosen(calls):
    model, x = network(), torch.rand(1, 3, 20, 20)
    with use_backend("reference"):
        assert "not chosen" in engine.unsupported_reason(model, x)
        model(x)
    assert not calls


def test_derivatives_forward_and_by_transforms_are_not_lost():
    model, x = network(), torch.rand(1, 3, 16, 16)
    reasons = []
    torch.func.vmap(lambda x: reasons.append(engine.unsupported_reason(model, x)) or x)(x)
    assert "torch.func" in reasons[0]
    direction, small = torch.randn_like(x), 1e-3
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in engine.unsupported_reason(model, x)
        with use_backend("reference"):
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            _, derivative = torch.autograd.forward_ad.unpack_dual(model(dual))
    difference = (model(x + small * direction) - model(x - small * direction)) / (2 * small)
    torch.testing.assert_close(derivative, difference, rtol=0.01, atol=0.01)


@torch.no_grad()
def test_compiles_to_one_graph_with_one_operator():
    torch._dynamo.reset()
    model, graphs = network(), []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    for shape in ((1, 3, 20, 28), (2, 3, 33, 17), (3, 3, 5, 40)):
        x = torch.rand(shape)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 2, "for one size, and for all"
    assert all(graph.count(torch.ops.seemore_fast.network.default) == 1 for graph in graphs)
    exponential_average(model)
    assert torch.equal(compiled(x), fresh(model)(x))
    frozen = model.prepare()(x)
    exponential_average(model)
    assert torch.equal(compiled(x), frozen)
    model.prepare()
    assert torch.equal(compiled(x), fresh(model)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_dispatcher_finds_the_operator_consistent(is_packed, dtype):
    model, x = network(num_layers=1), torch.rand(1, 3, 16, 17).to(dtype)
    config, weights = engine.config_of(model), model.ordered_parameters()
    weights = [engine.pack(weights, config)] if is_packed else weights
    arguments = (x, weights, is_packed, model.mean, 1.0, config.numbers())
    torch.library.opcheck(torch.ops.seemore_fast.network.default, arguments)


def test_the_configuration_has_the_fields_of_the_library_in_their_order():
    listed = re.search(r"#define SEEMORE_NETWORK_FIELDS(.*?)\n\n", (CSRC / "params/network.h").read_text(), re.DOTALL)
    assert tuple(re.findall(r"FIELD\((\w+)\)", listed[1])) == engine.EngineConfig._fields[:-1]
    config = engine.config_of(network())
    assert engine.EngineConfig.from_numbers(config.numbers()) == config


def test_threads_of_python_do_not_disturb_each_other():
    model, images = network(), [torch.rand(1, 3, 30, 40) for _ in range(4)]
    expected, results = [model(x) for x in images], [None] * 4

    def work(i):
        results[i] = [model(images[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[i]) for i in range(4) for y in results[i])


# Weights


def assert_follows(model, x, change):
    """After change(model), the model, or what is returned for it, is what a new one with its weights is."""
    before = model(x)
    with torch.no_grad():
        model = change(model) or model
    assert engine.unsupported_reason(model, x) is None
    expected = fresh(model)(x)
    assert not torch.equal(expected, before)
    assert torch.equal(model(x), expected)


def negate(model):
    model.body[0].global_block.block.proj.weight.mul_(-1)


def step(model):
    model.train().requires_grad_(True)
    with torch.enable_grad():
        model(torch.rand(1, 3, 16, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().requires_grad_(False)


def tie(model):
    model.body[1].global_block.block.proj.weight = model.body[0].global_block.block.proj.weight


def exponential_average(model):  # as BasicSR's EMA does it
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(0.1)


CHANGES = {
    "in place": negate,
    "param.data": exponential_average,
    "param.data replaced": lambda model: setattr(model.conv_2.weight, "data", -model.conv_2.weight.data),
    "parameter replaced": lambda model: setattr(model.conv_2, "bias", nn.Parameter(torch.rand(12), False)),
    "tied": tie,
    "load_state_dict": lambda model: model.load_state_dict(network().state_dict()) and None,
    "assign": lambda model: model.load_state_dict(network().state_dict(), assign=True) and model.requires_grad_(False),
    "to": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "optimizer": step,
    "deepcopy": lambda model: exponential_average(other := copy.deepcopy(model)) or other,
    "pickle": lambda model: exponential_average(other := pickle.loads(pickle.dumps(model))) or other,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_are_never_stale(mode, change):
    model, x = network(), torch.rand(1, 3, 20, 20)
    with mode():
        model(x)
    assert_follows(model, x, change)


def test_models_built_under_inference_mode():
    """Their parameters have no version counter, and cannot be told to have changed."""
    with torch.inference_mode():
        model, x = network(), torch.rand(1, 3, 20, 20)
        for change in (exponential_average, negate, CHANGES["deepcopy"]):
            assert_follows(model, x, change)
        model.prepare()
        expected = model(x)
    assert torch.equal(model(x.clone()), expected)


def test_parameters_given_for_one_call_are_used():
    model, other, x = network(), network(), torch.rand(1, 3, 20, 20)
    given = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(model, given, (x,)), other(x))


UNFREEZE = {
    "train": lambda model: model.train().eval(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()) and model,
    "to": lambda model: model.to("cpu"),
    "float": lambda model: model.float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "prepare": lambda model: model.prepare(),
}


@pytest.mark.parametrize("unfreeze", UNFREEZE.values(), ids=UNFREEZE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prepared_weights_are_frozen_until(mode, unfreeze):
    model, x = network(), torch.rand(2, 3, 20, 20)
    with mode():
        frozen = model(x)
        assert model.prepare() is model
        exponential_average(model)
        for _ in range(2):
            assert torch.equal(model.eval()(x), frozen)
    live = unfreeze(model)
    assert torch.equal(live(x), fresh(model)(x))


def test_prepared_weights_are_packed_once(monkeypatch):
    model = network().requires_grad_(True).prepare()
    monkeypatch.setattr(engine, "pack", None)
    with torch.no_grad():
        model(torch.rand(1, 3, 20, 20))


def test_prepared_weights_serve_every_precision(monkeypatch):
    model, x = network().prepare(), torch.rand(1, 3, 20, 20)
    full = model(x)
    monkeypatch.setattr(engine.native, "instruction_set", lambda: "avx512_bf16")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(x)
        assert torch.equal(fresh(model)(x), narrow)
    assert not torch.equal(narrow, full)
    assert torch.equal(model(x), full)


def test_prepare_is_refused_in_training_mode():
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval\(\)\.prepare\(\)"):
        network().train().prepare()
