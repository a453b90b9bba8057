"""Arguments of each operator by its name: float64 tensors of a shape and sizes, and options."""

from .ops import calibrate_shapes, expert_shapes, ffn_shapes, norm_shapes, random_parameters, striped_shapes


def striped_conv(device, shape=(2, 3, 6, 7), taps=7, gated=True, **options):
    images = {"x": shape, "gate": shape} if gated else {"x": shape}
    return random_parameters(images | striped_shapes(shape[1], taps), device) | options


def striped_conv_router(device, shape=(2, 3, 6, 7), taps=3, experts=3, top_k=2, **options):
    shapes = {"x": shape, **striped_shapes(shape[1], taps), "weight_router": (experts, shape[1])}
    tensors = random_parameters(shapes, device)
    tensors["weight_router"] *= 5  # the images' means are near each other
    return tensors | {"top_k": top_k} | options


def calibrate(device, shape=(2, 3, 9, 14), recursive=1):
    return random_parameters({"k": shape} | calibrate_shapes(shape[1]), device) | {"recursive": recursive}


def router(device, shape=(3, 5, 6, 7), experts=4, sharpness=5, top_k=2):
    tensors = random_parameters({"a": shape, "weight": (experts, shape[1])}, device)
    tensors["weight"] *= sharpness * (shape[2] * shape[3]) ** 0.5  # the pool of noise is near 0
    return tensors | {"top_k": top_k}


def norm_pointwise(device, shape=(2, 3, 6, 7), out=5, residual=False, **options):
    return pointwise(device, shape, out, residual, **options) | random_parameters(norm_shapes(shape[1]), device, seed=1)


def pointwise(device, shape=(2, 3, 6, 7), out=5, residual=True, **options):
    shapes = {"x": shape, "weight": (out, shape[1], 1, 1), "bias": (out,)}
    shapes |= {"residual": (shape[0], out, *shape[2:])} if residual else {}
    return random_parameters(shapes, device) | options


def norm_conv3x3(device, shape=(2, 3, 6, 7), norm=True, pointwise=True, middle=5, out=4, activation="gelu", **options):
    shapes = {"x": shape} | (norm_shapes(shape[1]) if norm else {})
    shapes |= {"weight": (middle, shape[1], 3, 3), "bias": (middle,)}
    shapes |= {"weight_pw": (out, middle, 1, 1), "bias_pw": (out,)} if pointwise else {}
    without = {} if norm else {"norm_weight": None, "norm_bias": None}
    return random_parameters(shapes, device) | without | {"activation": activation} | options


def conv3x3_shuffle(device, shape=(2, 3, 6, 7), picture=3, scale=2, **options):
    made = picture * scale**2
    shapes = {"x": shape, "weight": (made, shape[1], 3, 3), "bias": (made,), "mean": (1, picture, 1, 1)}
    return random_parameters(shapes, device) | {"scale": scale} | options


def gated_ffn(device, shape=(2, 3, 6, 7), **options):
    return random_parameters({"x": shape} | norm_shapes(shape[1]) | ffn_shapes(shape[1]), device) | options


def low_rank_experts(device, shape=(3, 5, 4, 6), ranks=(2, 4, 8), top_k=2, projected=False, **options):
    """Return random tensors by which every image chooses its own experts, in no order."""
    choice = random_parameters({"scores": (shape[0], len(ranks))}, device, seed=1)["scores"]
    shapes = {"a": shape, "k": shape, "expert_weight": (shape[0], top_k)} | expert_shapes(shape[1], ranks)
    tensors = random_parameters(shapes, device)
    tensors["expert_weight"] = tensors["expert_weight"].sigmoid()
    tensors["expert_index"] = choice.argsort(dim=1)[:, :top_k].contiguous()
    if projected:
        shapes = {"weight_proj": (shape[1], shape[1], 1, 1), "bias_proj": (shape[1],), "residual": shape}
        tensors |= random_parameters(shapes, device, seed=2)
    return tensors | {"ranks": ranks} | options


def layer_norm(device, shape=(2, 8, 6, 7), **options):
    return random_parameters({"x": shape, "weight": (shape[1],), "bias": (shape[1],)}, device) | options
