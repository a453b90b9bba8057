"""Time the whole network against eager PyTorch and torch.compile, for inference and for a training step.

    python benchmarks/bench_model.py --device cuda

Every provider's output is compared with the float64 reference before it is timed; a wrong one is reported and not
timed, a peer that is not installed is reported absent. Providers run in turn, and the median counts. The table
goes to the terminal, the figures as JSON to benchmarks/results/<device>/model.json.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import seemore_fast
from seemore_fast.presets import PRESETS

CASES_CUDA = {  # preset, scale, batch, height, width, dtype
    "inference T x4 480x640 fp32": ("t", 4, 1, 480, 640, torch.float32),
    "inference T x4 480x640 bf16": ("t", 4, 1, 480, 640, torch.bfloat16),
    "inference L x4 480x640 bf16": ("l", 4, 1, 480, 640, torch.bfloat16),
    "training T x2 32x64x64 fp32": ("t", 2, 32, 64, 64, torch.float32),
    "training T x2 32x64x64 bf16": ("t", 2, 32, 64, 64, torch.bfloat16),
}
CASES_CPU = {
    "inference T x4 320x180 fp32": ("t", 4, 1, 180, 320, torch.float32),
    "training T x2 8x64x64 fp32": ("t", 2, 8, 64, 64, torch.float32),
}
CASES_QUICK = {
    "inference T x2 64x64 fp32": ("t", 2, 1, 64, 64, torch.float32),
    "training T x2 2x32x32 fp32": ("t", 2, 2, 32, 32, torch.float32),
}
# Largest deviation from float64 of an image in [0, 1]: the contract's for float32, a few steps of 8 bits for bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def providers(config: dict, weights: dict, device: torch.device) -> dict:
    """Return name -> module with the same weights, or a string that says why it is absent."""

    def load(model_class):
        model = model_class(**config)
        model.load_state_dict(weights)
        return model.to(device)

    found = {
        "seemore-fast": load(seemore_fast.SeemoRe),
        "reference eager": load(seemore_fast.reference.SeemoRe),
        "reference torch.compile": torch.compile(load(seemore_fast.reference.SeemoRe)),
        "published eager": "not installed (PyPI's seemore, cv2)",
        "published channels_last": "not installed (PyPI's seemore, cv2)",
    }
    if importlib.util.find_spec("seemore") and importlib.util.find_spec("cv2"):
        from seemore.module import SeemoRe as Published

        found["published eager"] = load(Published)
        found["published channels_last"] = load(Published).to(memory_format=torch.channels_last)
    return found


def memory_format(model) -> torch.memory_format:
    """Return the layout that a model's dense convolutions have, for its input."""
    channels_last = model.conv_2.weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def inference(model, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run a forward pass, under autocast for bfloat16."""
    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return model(x)


def training_step(model, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run forward and backward of an L1 loss; return the output."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = model(x)
    F.l1_loss(y.float(), torch.zeros_like(y, dtype=torch.float32)).backward()
    return y.detach()


def run_case(name: str, case: tuple, device: torch.device, runs: int) -> dict:
    """Return the figures of every provider in one case."""
    preset, scale, batch, height, width, dtype = case
    config = {"scale": scale, **PRESETS[preset]}
    torch.manual_seed(0)
    truth_model = seemore_fast.reference.SeemoRe(**config)
    weights = truth_model.state_dict()
    # Inputs rotate: none is in a cache from its last use.
    inputs = [torch.rand(batch, 3, height, width).to(device) for _ in range(4)]
    with torch.no_grad():
        truth = truth_model.double().to(device)(inputs[0].double()).float()
    del truth_model
    step, training = (training_step, True) if name.startswith("training") else (inference, False)

    result, timed, laid_out = {}, {}, {}
    for provider, model in providers(config, weights, device).items():
        if isinstance(model, str):
            result[provider] = {"absent": model}
            continue
        model.train(training)
        laid_out[provider] = [x.contiguous(memory_format=memory_format(model)) for x in inputs]
        try:
            error = (step(model, laid_out[provider][0], dtype).float() - truth).abs().max().item()
        except Exception as failure:  # a peer that breaks is a result, not the end of the benchmark
            result[provider] = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
            continue
        result[provider] = {"max_error": error}
        if not error <= TOLERANCE[dtype]:
            result[provider]["wrong"] = f"deviates by more than {TOLERANCE[dtype]}"
            continue
        timed[provider] = model
    times = {provider: [] for provider in timed}
    for i in range(runs + 2):  # two to warm up
        for provider, model in timed.items():
            milliseconds, peak = measure(lambda m=model, x=laid_out[provider][i % 4]: step(m, x, dtype), device)
            times[provider].append(milliseconds)
            result[provider]["peak_mb"] = peak
    for provider, values in times.items():
        values = sorted(values[2:])
        result[provider] |= {"ms": statistics.median(values), "ms_min": values[0], "ms_max": values[-1]}
    return result


def measure(call, device: torch.device) -> tuple[float, float | None]:
    """Return milliseconds of one call and, on CUDA, the peak of allocated memory in MB."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start), None
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated(device) / 2**20


def print_table(name: str, result: dict):
    print(f"\n{name}")
    ours = result["seemore-fast"].get("ms")
    for provider, figures in result.items():
        if "ms" not in figures:
            print(f"  {provider:24s} {next(str(v) for k, v in figures.items() if k != 'max_error')}")
            continue
        peak = f"{figures['peak_mb']:8.0f} MB" if figures["peak_mb"] is not None else ""
        ratio = f"{figures['ms'] / ours:6.2f}x ours" if ours else ""
        print(f"  {provider:24s} {figures['ms']:9.2f} ms {ratio} {peak}  error {figures['max_error']:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here: run with --device cpu --quick to try the benchmark itself")
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    results = {}
    cases = CASES_QUICK if options.quick else CASES_CUDA if device.type == "cuda" else CASES_CPU
    for name, case in cases.items():
        results[name] = run_case(name, case, device, options.runs)
        print_table(name, results[name])
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    facts = {
        "device": device_name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "backend_info": seemore_fast.backend_info(),
        "runs": options.runs,
        "cases": results,
    }
    folder = options.results / re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.json"
    path.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"\nfigures in {path}")


if __name__ == "__main__":
    main()
