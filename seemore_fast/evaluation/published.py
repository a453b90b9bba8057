"""Published Y-PSNR in dB and SSIM by network, scale and data set (SeemoRe, ICML 2024, table 1)."""

from ..network.config import PRESETS

PUBLISHED = {
    ("bicubic", 2): {"Set5": (33.66, 0.9299), "Set14": (30.24, 0.8688), "B100": (29.56, 0.8431),
                     "Urban100": (26.88, 0.8403), "Manga109": (30.80, 0.9339)},
    ("bicubic", 3): {"Set5": (30.39, 0.8682), "Set14": (27.55, 0.7742), "B100": (27.21, 0.7385),
                     "Urban100": (24.46, 0.7349), "Manga109": (26.95, 0.8556)},
    ("bicubic", 4): {"Set5": (28.42, 0.8104), "Set14": (26.00, 0.7027), "B100": (25.96, 0.6675),
                     "Urban100": (23.14, 0.6577), "Manga109": (24.89, 0.7866)},
    ("SeemoRe-T", 2): {"Set5": (38.06, 0.9608), "Set14": (33.65, 0.9186), "B100": (32.23, 0.9004),
                       "Urban100": (32.22, 0.9286), "Manga109": (39.01, 0.9777)},
    ("SeemoRe-T", 3): {"Set5": (34.46, 0.9276), "Set14": (30.44, 0.8445), "B100": (29.15, 0.8063),
                       "Urban100": (28.27, 0.8538), "Manga109": (33.92, 0.9460)},
    ("SeemoRe-T", 4): {"Set5": (32.31, 0.8965), "Set14": (28.72, 0.7840), "B100": (27.65, 0.7384),
                       "Urban100": (26.23, 0.7883), "Manga109": (30.82, 0.9107)},
    # without SSIM
    ("SeemoRe-B", 2): {"Urban100": (32.52, None), "Manga109": (39.30, None)},
    ("SeemoRe-B", 4): {"Urban100": (26.52, None), "Manga109": (31.12, None)},
    ("SeemoRe-L", 2): {"Urban100": (32.87, None), "Manga109": (39.49, None)},
    ("SeemoRe-L", 4): {"Urban100": (26.79, None), "Manga109": (31.48, None)},
}  # fmt: skip
_OTHER_NAMES = {"bsd100": "b100", "bsds100": "b100"}


def published(network: str, scale: int, data: str) -> str:
    """Return PSNR and SSIM of "bicubic" or "SeemoRe-T" on a data set (case-insensitive): "38.06/0.9608"."""
    wanted = _OTHER_NAMES.get(data.lower(), data.lower())
    sets = PUBLISHED.get((network, scale), {})
    known = next((value for name, value in sets.items() if name.lower() == wanted), None)
    if known is None:
        return "unknown"
    psnr, ssim = known
    return f"{psnr:.2f}" if ssim is None else f"{psnr:.2f}/{ssim:.4f}"


def nearest_network(config: dict) -> str:
    """Return the published network nearest in groups and channels: "SeemoRe-B"."""

    def distance(size: str) -> float:
        return sum(abs(config[name] / PRESETS[size][name] - 1) for name in ("num_layers", "embedding_dim"))

    return f"SeemoRe-{min(PRESETS, key=distance).upper()}"
