"""Time every operator: each backend, eager PyTorch in two layouts, a memory copy and matrix products.

    seemore-fast benchmark kernels          (or: python benchmarks/operators.py)

Results and gradients are compared with the reference in float64 before any timing. A complete run writes a file of
results for each operator; `pytest benchmarks/` times the same cases with pytest-benchmark.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch

import seemore_fast
from seemore_fast import ops, reference
from seemore_fast.benchmarks import command, harness
from seemore_fast.benchmarks.cases import (
    OPERATORS,
    RANKS,
    TOP_K,
    Setting,
    in_mode,
    input_shapes,
    recursive_of,
    result_shapes,
)

EAGER = {"torch eager": torch.contiguous_format, "torch eager channels_last": torch.channels_last}


def build(name: str, setting: Setting, device: torch.device, options) -> harness.Case:
    """Return the Case of an operator, with eager PyTorch in two layouts and, on request, torch.compile."""
    operator, mode = OPERATORS[name], setting.mode
    most = 2 if options.quick else harness.MAX_SETS
    inputs = harness.input_sets(partial(random_inputs, name, setting, device), device, most)
    make_eager, make_ours, parameters = providers_of(name, setting, device)
    providers = on_backends(name, make_ours(), mode, device, options.instruction_sets)
    providers |= {provider: make_eager(layout=layout) for provider, layout in EAGER.items()}
    if options.compile:
        providers["torch.compile"] = make_eager(compile=True)
    traffic = operator.traffic and in_mode(operator.traffic(setting), mode)
    operations = in_mode(operator.operations(setting), mode)
    exact = make_eager(dtype=torch.float64)
    return harness.operator_case(providers, inputs, exact, mode, operations, traffic, parameters)


def random_inputs(name: str, setting: Setting, device: torch.device, seed: int) -> harness.InputSet:
    """Return images in the setting's layout, parameters and, for a backward, the gradients of the results.

    Everything is of the setting's dtype but the gradients of probabilities, which are float32.
    """
    shapes = input_shapes(name, setting)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    if setting.mode != "forward":
        shapes |= {f"upstream_{i}": shape for i, shape in enumerate(result_shapes(name, setting))}
    tensors = harness.random_tensors(shapes, setting.dtype, device, seed)
    for key, tensor in tensors.items():
        is_gradient = key.startswith("upstream")
        if is_gradient and tensor.dim() != 4:
            tensors[key] = tensor.float()
        elif is_gradient or shapes[key] == setting.shape:
            tensors[key] = tensor.contiguous(memory_format=layout)
    return tensors


def providers_of(name: str, setting: Setting, device: torch.device) -> tuple[Callable, Callable, int]:
    """Return functions that make providers of the reference and of ours, and the bytes of parameters that they hold.

    The first one takes a layout, `compile`, or another dtype than the setting's.
    """
    if OPERATORS[name].block:
        models = [module.SeemoRe(**block_config(setting)) for module in (reference, seemore_fast)]
        models[1].load_state_dict(models[0].state_dict())
        block = getattr(models[0].body[0], OPERATORS[name].block)
        count = sum(parameter.numel() for parameter in block.parameters())
        makers = (partial(block_provider, model, name, setting, device) for model in models)
        return *makers, count * setting.dtype.itemsize
    options = OPERATORS[name].options(setting, device)
    eager, fused = (partial(getattr(module, name), **options) for module in (reference, ops))

    def provider(layout: torch.memory_format | None = None, compile: bool = False, dtype: torch.dtype | None = None):
        return harness.operator(torch.compile(eager) if compile else eager, setting.mode, layout)

    return provider, lambda: harness.operator(fused, setting.mode), 0


def block_config(setting: Setting) -> dict:
    """Return the smallest network that has a setting's blocks."""
    torch.manual_seed(0)
    return {
        "scale": 2,
        "embedding_dim": setting.channels,
        "num_layers": 1,
        "num_experts": len(RANKS),
        "lr_space": "exp",
        "topk": TOP_K,
        "recursive": recursive_of(setting.shape),
    }


def block_provider(
    model: torch.nn.Module,
    name: str,
    setting: Setting,
    device: torch.device,
    layout: torch.memory_format | None = None,
    compile: bool = False,
    dtype: torch.dtype | None = None,
) -> harness.Provider:
    """Return a provider of a block of a network, which holds its parameters."""
    weight_layout = layout or torch.contiguous_format
    model = copy.deepcopy(model).to(device=device, dtype=dtype or setting.dtype, memory_format=weight_layout)
    if setting.mode == "forward" and isinstance(model, seemore_fast.SeemoRe):
        model.eval().prepare()
    block = getattr(model.body[0], OPERATORS[name].block)
    function = torch.compile(block) if compile else block
    return harness.operator(lambda x: function(x), setting.mode, layout, parameters=tuple(block.parameters()))


def on_backends(
    name: str, provider: harness.Provider, mode: str, device: torch.device, instruction_sets: bool
) -> dict[str, harness.Provider | str]:
    """Return a provider on every backend that has the operator, or on the reference where none has.

    The operators of a block run on the backend that `auto` chooses for each.
    """
    if OPERATORS[name].block:
        return {f"{harness.OURS} auto": harness.inside(partial(seemore_fast.use_backend, "auto"), provider)}
    table = harness.ours(provider, device, instruction_sets)
    kernels = seemore_fast.backend_info()["operators"]
    backends = kernels.get(name, []) + kernels.get(OPERATORS[name].kernel, [])
    for row, there in table.items():
        if callable(there) and row.split()[1] not in backends:
            table[row] = f"this backend has no kernel of {name}"
    gpu = f"{harness.OURS} {'cuda' if 'cuda' in backends or 'triton' not in backends else 'triton'}"
    if mode == "forward" and gpu in table:
        there = table[gpu]
        table[gpu + harness.IN_A_GRAPH] = harness.in_a_graph(there) if callable(there) else there
    if not any(map(callable, table.values())):
        on_reference = partial(seemore_fast.use_backend, "reference")
        table[f"{harness.OURS} reference"] = harness.inside(on_reference, provider)
    return table


def main(arguments: list[str] | None = None, prog: str | None = None):
    parser = command.parser(__doc__, prog)
    command.add_options(parser, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="NAME",
                        help="default: all")  # fmt: skip
    options, wrong = parser.parse_args(arguments), []
    if options.name and len(options.operators) > 1:
        parser.error("--name names one file: choose one of the --operators")
    tables = {name: OPERATORS[name].cases() for name in options.operators}
    command.check_options(parser, options, *tables.values())
    for name, cases in tables.items():
        if command.choose(options, cases):
            print(f"\n{name}")
            if not command.run_cases(options.name or name, options, cases, partial(build, name)):
                wrong.append(name)
    if wrong:
        raise SystemExit(f"seemore-fast is wrong or fails in {', '.join(wrong)}: see above")


if __name__ == "__main__":
    main()
