"""What the benchmarks of single operators share: titles, inputs, and who takes part."""

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


def titled(settings: list[NamedTuple]) -> dict[str, NamedTuple]:
    """Return the settings in every mode, by title."""
    in_modes = [setting._replace(mode=mode) for mode in harness.MODES for setting in settings]
    return {setting.title(): setting for setting in in_modes}


def title(setting: NamedTuple, *words: str) -> str:
    """Return mode, shape, words and dtype of a setting, and whether its images are channels_last."""
    layout = ["channels_last"] if setting.channels_last else []
    return " ".join([setting.mode, "x".join(map(str, setting.shape)), *words, harness.SHORT[setting.dtype], *layout])


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
    """Return the operator on every backend that has it; where none does, on the reference, to try the call."""
    provider = harness.operator(fused, mode)
    table = harness.ours(provider, device, instruction_sets)
    have = seemore_fast.backend_info()["operators"].get(stem, [])
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
    upstream: tuple[int, ...] | None = None,
    traffic: int | None = None,
    **options,
) -> harness.Case:
    """Return the Case of operator `stem`, against eager PyTorch in two layouts and, if asked, torch.compile.

    `upstream` is the shape of a result that is no image, and float32; `options` are the operator's.
    """
    mode, layout = setting.mode, torch.channels_last if setting.channels_last else torch.contiguous_format
    shapes = images | parameters | ({} if mode == "forward" else {"upstream": upstream or setting.shape})

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
