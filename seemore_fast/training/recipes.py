"""Recipes of the published networks: the published steps, batch, rates and losses. Only the images are the user's."""


def _recipe(size: str, scale: int) -> dict:
    start = "interpolation" if scale == 2 else f"runs/{size}_x{scale - 1}/weights.safetensors"
    return {
        "out": f"runs/{size}_x{scale}",
        "steps": 500_000,
        "ema": 0.999,
        "init_from": start,
        "model": {"preset": size, "scale": scale},
        "data": {"patch": 64, "batch": 32},
        "optimizer": {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.99]},
        "schedule": {"name": "multistep", "milestones": [250_000, 400_000, 450_000, 475_000], "gamma": 0.5},
        "loss": {"l1": 1.0, "fft": 0.1},
    }


RECIPES = {f"{size}_x{scale}": _recipe(size, scale) for size in "blt" for scale in (2, 3, 4)}
