"""Networks away from their initial values."""

import torch

from seemore_fast import SeemoRe

T = dict(num_experts=3, num_layers=6, embedding_dim=36, use_shuffle=True, lr_space="exp", topk=1, recursive=2)
SMALL = {**T, "scale": 2, "num_layers": 2, "embedding_dim": 12}

# What differs from SMALL, and the shape of x.
CASES = {
    "T, narrow": (dict(), (1, 3, 33, 50)),
    "smallest": (dict(), (1, 3, 16, 16)),
    "one pixel": (dict(), (1, 3, 1, 1)),
    "one pixel tall": (dict(), (2, 3, 1, 45)),
    "one pixel wide": (dict(), (1, 3, 45, 1)),
    "wide": (dict(), (1, 3, 17, 310)),
    "tall": (dict(), (1, 3, 250, 18)),
    "batch of 5": (dict(), (5, 3, 19, 23)),
    "1 feature": (dict(embedding_dim=1), (1, 3, 20, 20)),
    "5 features": (dict(embedding_dim=5), (2, 3, 19, 17)),
    "13 features, no shuffle": (dict(embedding_dim=13, use_shuffle=False), (1, 3, 22, 37)),
    "kernel 1": (dict(global_kernel_size=1), (1, 3, 21, 130)),
    "kernel 3": (dict(global_kernel_size=3), (1, 3, 21, 30)),
    "kernel 7": (dict(global_kernel_size=7), (1, 3, 21, 30)),
    "kernel 31": (dict(global_kernel_size=31), (1, 3, 41, 130)),
    "recursive 1": (dict(recursive=1), (2, 3, 4, 9)),
    "recursive 3": (dict(recursive=3), (1, 3, 65, 70)),
    "all experts": (dict(num_experts=5, lr_space="linear", topk=5), (2, 3, 18, 19)),
    "2 of 4 experts": (dict(num_experts=4, lr_space="double", topk=2), (2, 3, 18, 19)),
    "one expert": (dict(num_experts=1), (1, 3, 18, 19)),
    "one group": (dict(num_layers=1), (1, 3, 18, 19)),
    "scale 1": (dict(scale=1), (1, 3, 18, 19)),
    "scale 3": (dict(scale=3, in_chans=1), (2, 1, 18, 19)),
    "scale 4": (dict(scale=4, in_chans=4), (1, 4, 18, 120)),
    "range 255": (dict(img_range=255.0), (1, 3, 18, 19)),
}


def network(**changes) -> SeemoRe:
    """Return a model away from its initial values, whose routers are decided."""
    model = SeemoRe(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
            if ".gate.body." in name:
                parameter *= 30
    return model.requires_grad_(False)


def route_apart(model, x):
    """Set the first router so that each of the first images prefers an expert of its own; return its choices at x."""
    gate = model.body[0].local_block.block.moe_layer.gate
    seen = []
    handle = gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].mean((2, 3)), output[0])))
    model(x)
    mean = seen[0][0].mean(0)
    apart = seen[0][0] - mean
    apart -= (apart @ mean / mean.dot(mean))[:, None] * mean
    gate.body[2].weight.copy_(1000 * apart[: len(gate.body[2].weight)])
    model(x)
    handle.remove()
    return seen[-1][1]
