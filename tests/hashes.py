"""Hashes of outputs and gradients: shows that a change which should not move a bit did not.

    python tests/hashes.py --write before.json     # at the old commit
    python tests/hashes.py --check before.json     # at the new one: names what differs, exit status 1

Every operator on every CPU instruction set and on the reference, forward and gradients; the networks T, B and L in
inference (float32, bfloat16, uint8, streamed) and in training. Hashes hold for one machine and one torch.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import seemore_fast
from seemore_fast import Upscaler, ops
from seemore_fast.backends import native

RANKS = (2, 3, 4)
C = 12
FFN = {"norm_weight": (C,), "norm_bias": (C,), "weight_1": (2 * C, C, 1, 1), "bias_1": (2 * C,),
       "weight_gate": (C, 1, 3, 3), "bias_gate": (C,), "weight_2": (C, C, 1, 1), "bias_2": (C,)}  # fmt: skip
EXPERTS = {"weight_a": (9, C), "bias_a": (9,), "weight_k": (9, C), "bias_k": (9,),
           "weight_out": (C, 9), "bias_out": (3, C)}  # fmt: skip


def stripes(taps: int) -> dict:
    return {"weight_row": (C, 1, 1, taps), "bias_row": (C,), "weight_col": (C, 1, taps, 1), "bias_col": (C,)}


def cases() -> Iterator[tuple[str, str, dict, dict]]:
    """Yield name, operator, shapes of its tensors and options of each case."""
    for batch, height, width in ((1, 5, 7), (2, 19, 37), (1, 64, 48)):
        image = (batch, C, height, width)
        size = f"{batch}x{height}x{width}"
        for taps in (3, 5, 11):
            shapes = {"x": image, **stripes(taps), "gate": image}
            yield f"striped_conv {taps} {size}", "striped_conv", shapes, {"activation": "gelu"}
        routed = {"x": image, **stripes(3), "weight_router": (3, C)}
        yield f"striped_conv_router {size}", "striped_conv_router", routed, {"top_k": 2, "activation": "gelu"}
        yield f"router {size}", "router", {"a": image, "weight": (3, C)}, {"top_k": 2}
        normed = {"x": image, "norm_weight": (C,), "norm_bias": (C,)}
        pointwise = {"weight": (2 * C, C, 1, 1), "bias": (2 * C,)}
        yield f"norm_pointwise {size}", "norm_pointwise", normed | pointwise, {"activation": "gelu"}
        yield f"pointwise {size}", "pointwise", {"x": image, **pointwise}, {"activation": "gelu"}
        conv = {"weight": (C, C, 3, 3), "bias": (C,)}
        yield f"norm_conv3x3 {size}", "norm_conv3x3", normed | conv, {}
        expand = {"weight_pw": (2 * C, C, 1, 1), "bias_pw": (2 * C,)}
        yield f"norm_conv3x3 expand {size}", "norm_conv3x3", normed | conv | expand, {"activation": "gelu"}
        shuffle = {"x": image, "weight": (12, C, 3, 3), "bias": (12,), "mean": (1, 3, 1, 1)}
        yield f"conv3x3_shuffle {size}", "conv3x3_shuffle", shuffle, {"scale": 2}
        yield f"gated_ffn {size}", "gated_ffn", {"x": image, **FFN}, {}
        index = torch.tensor([[2, 0], [1, 2]][:batch])
        chosen = {"a": image, "k": image, "expert_weight": (batch, 2), **EXPERTS}
        yield f"low_rank_experts {size}", "low_rank_experts", chosen, {"expert_index": index, "ranks": RANKS}
        if height >= 16:
            calibrate = {"k": image, "weight_agg": (C, 1, 4, 4), "bias_agg": (C,), "weight_dw": (C, 1, 3, 3),
                         "bias_dw": (C,), "weight_pw": (C, C, 1, 1), "bias_pw": (C,)}  # fmt: skip
            yield f"calibrate {size}", "calibrate", calibrate, {"recursive": 2}


def digest(*tensors: torch.Tensor | None) -> str:
    """Return a hash of the tensors' types, shapes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.detach().contiguous()
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()[:16]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if len(shape) == 4 and min(shape[2:]) > 4 else 0.3
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def operator_hashes(dtype: torch.dtype, layout: torch.memory_format) -> dict[str, str]:
    """Return hashes of results and of the gradients of all tensors, by case."""
    found = {}
    for name, operator, shapes, options in cases():
        tensors = {key: random(shape, dtype, seed) for seed, (key, shape) in enumerate(shapes.items())}
        tensors = {k: t.contiguous(memory_format=layout) if t.dim() == 4 else t for k, t in tensors.items()}
        for tensor in tensors.values():
            tensor.requires_grad_()
        results = getattr(ops, operator)(**tensors, **options)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [r for r in results if r.requires_grad]
        gradients = torch.autograd.grad(
            wanted, list(tensors.values()), [random(tuple(r.shape), r.dtype, 99) for r in wanted], allow_unused=True
        )
        found[f"{name}: results"] = digest(*results)
        found[f"{name}: gradients"] = digest(*gradients)
    return found


def network_hashes(preset: str) -> dict[str, str]:
    """Return hashes of a network with random weights: inference by every way, and a training step's gradients."""
    torch.manual_seed(1)
    model = getattr(seemore_fast, preset)(scale=2).eval()
    found = {}
    is_small = preset == "seemore_t"
    for shape in ((1, 3, 5, 9), (2, 3, 33, 50), (1, 3, 100, 67)) if is_small else ((1, 3, 19, 33),):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    found[f"{shape} {threads} threads {dtype} autocast"] = digest(model(x))
            with torch.no_grad():
                found[f"{shape} {threads} threads prepared"] = digest(model.prepare()(x))
            model.train().eval()
    picture = (255 * np.random.default_rng(3).random((41, 53, 3) if is_small else (17, 21, 3))).astype(np.uint8)
    for streamed in (False, True):
        for kind in (np.uint8, np.uint16):
            upscale = Upscaler(model, stream=streamed)
            found[f"{kind.__name__} {streamed=}"] = digest(torch.from_numpy(upscale(picture.astype(kind))))
    for dtype in (torch.float32, torch.bfloat16):
        for recompute in ("auto", "none", "block") if is_small else ("auto",):
            model.train().recompute = recompute
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                y = model(torch.rand((2, 3, 17, 19), generator=torch.Generator().manual_seed(4)))
                y.square().mean().backward()
            found[f"training {dtype} {recompute}"] = digest(y, *(p.grad for p in model.parameters()))
            model.zero_grad()
    return found


def all_hashes() -> dict[str, str]:
    """Return all hashes by what they are of."""
    if reason := native.load_cpu():
        raise SystemExit(reason)
    found = {}
    for where in ("reference", *native.instruction_sets()):
        if where != "reference":
            native.use_instruction_set(where)
        seemore_fast.use_backend("reference" if where == "reference" else "auto")
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                hashes = operator_hashes(dtype, layout)
                found |= {f"{where} {dtype} {layout} {name}": value for name, value in hashes.items()}
        for preset in ("seemore_t", "seemore_b", "seemore_l"):
            found |= {f"{where} {preset} {name}": value for name, value in network_hashes(preset).items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="write the hashes to a file")
    action.add_argument("--check", type=Path, metavar="FILE", help="compare with the hashes of a file")
    options = parser.parse_args()
    found = all_hashes()
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} hashes written to {options.write}")
        return 0
    expected = json.loads(options.check.read_text())
    different = [name for name in expected if found.get(name) != expected[name]]
    print(*(f"differs: {name}" for name in different), sep="\n")
    print(f"{len(different)} of {len(expected)} hashes differ")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
