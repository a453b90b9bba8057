"""The published sizes of the network: T, B and L."""

_COMMON = dict(in_chans=3, num_experts=3, img_range=1.0, global_kernel_size=11, lr_space="exp", topk=1)
PRESETS = {
    "t": dict(num_layers=6, embedding_dim=36, use_shuffle=True, recursive=2, **_COMMON),
    "b": dict(num_layers=8, embedding_dim=48, use_shuffle=True, recursive=2, **_COMMON),
    "l": dict(num_layers=16, embedding_dim=48, use_shuffle=False, recursive=1, **_COMMON),
}
