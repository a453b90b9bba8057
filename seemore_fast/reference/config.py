"""Arguments of the network: their constants and checks."""

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
LR_SPACES = {
    "linear": lambda i: i + 2,
    "exp": lambda i: 2 ** (i + 1),
    "double": lambda i: 2 * i + 2,
}


def expert_ranks(lr_space: str, num_experts: int) -> tuple[int, ...]:
    """Return the rank of each expert, e.g. (2, 4, 8) for "exp" and three experts."""
    return tuple(LR_SPACES[lr_space](i) for i in range(num_experts))


def check_config(
    scale: int,
    in_chans: int,
    num_experts: int,
    num_layers: int,
    embedding_dim: int,
    img_range: float,
    use_shuffle: bool,
    global_kernel_size: int,
    recursive: int,
    lr_space: str,
    topk: int,
):
    """Raise ValueError for a configuration that no SeemoRe can have, naming the argument, its value and the remedy."""
    for name, value in {
        "scale": scale, "in_chans": in_chans, "num_experts": num_experts, "num_layers": num_layers,
        "embedding_dim": embedding_dim, "recursive": recursive, "topk": topk,
        "global_kernel_size": global_kernel_size,
    }.items():  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    if global_kernel_size % 2 == 0:
        raise ValueError(f"global_kernel_size is {global_kernel_size}, expected an odd number")
    if topk > num_experts:
        raise ValueError(f"topk is {topk}, expected at most num_experts, which is {num_experts}")
    if recursive > 8:
        raise ValueError(f"recursive is {recursive}, expected at most 8: images would need 4^recursive pixels a side")
    if not isinstance(lr_space, str) or lr_space not in LR_SPACES:
        raise ValueError(f"lr_space is {lr_space!r}, expected one of {', '.join(map(repr, LR_SPACES))}")
    if not isinstance(img_range, (int, float)) or not img_range > 0:
        raise ValueError(f"img_range is {img_range!r}, expected a positive number")
