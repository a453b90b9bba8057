"""Arguments of the network: their constants and checks."""

from typing import Any

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
LR_SPACES = {
    "linear": lambda i: i + 2,
    "exp": lambda i: 2 ** (i + 1),
    "double": lambda i: 2 * i + 2,
}


def expert_ranks(lr_space: str, num_experts: int) -> tuple[int, ...]:
    """Return the rank of each expert, e.g. (2, 4, 8) for "exp" and three experts."""
    return tuple(LR_SPACES[lr_space](i) for i in range(num_experts))


def check_config(config: dict[str, Any]):
    """Raise ValueError for arguments that no SeemoRe can have, naming the argument, its value and the remedy."""
    for name, value in config.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if name not in ("img_range", "use_shuffle", "lr_space") and not (is_whole and value >= 1):
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    taps, top_k, experts = config["global_kernel_size"], config["topk"], config["num_experts"]
    recursive, lr_space, img_range = config["recursive"], config["lr_space"], config["img_range"]
    if taps % 2 == 0:
        raise ValueError(f"global_kernel_size is {taps}, expected an odd number")
    if top_k > experts:
        raise ValueError(f"topk is {top_k}, expected at most num_experts, which is {experts}")
    if recursive > 8:
        raise ValueError(f"recursive is {recursive}, expected at most 8: images would need 4^recursive pixels a side")
    if not isinstance(lr_space, str) or lr_space not in LR_SPACES:
        raise ValueError(f"lr_space is {lr_space!r}, expected one of {', '.join(map(repr, LR_SPACES))}")
    if not isinstance(img_range, (int, float)) or not img_range > 0:
        raise ValueError(f"img_range is {img_range!r}, expected a positive number")
