"""SeemoRe for BasicSR: importing this module lets `network_g: type: SeemoReFast` in a yml build this package's network.

The other options of `network_g` and the checkpoints are those of the published SeemoRe. Import this module before the
network is built: at the top of the script that calls `basicsr.train.train_pipeline`, or as the one line of a new file
`basicsr/archs/seemore_fast_arch.py`. The import is also enough for forks whose package is named `basicsr`, such as the
published SeemoRe repository; for other registries call `register`. A framework with a package of another name needs
neither BasicSR nor this module: add a subclass of `seemore_fast.SeemoRe` to its registry.
"""

from typing import Any

from ..network.model import SeemoRe

try:
    from basicsr.utils.registry import ARCH_REGISTRY
except ImportError as error:
    raise ImportError(
        "seemore_fast.integrations.basicsr needs BasicSR: pip install basicsr, or put a fork that provides the package "
        "basicsr on the path. BasicSR 1.4.2 itself fails beside torchvision 0.17 and later, until its "
        "data/degradations.py imports rgb_to_grayscale from torchvision.transforms.functional. "
        f"The error: {error}"
    ) from error


class SeemoReFast(SeemoRe):
    """`seemore_fast.SeemoRe` under a name of its own, so that a fork's SeemoRe stays available."""


def register(registry: Any = None):
    """Add `SeemoReFast` to `registry`, by default BasicSR's ARCH_REGISTRY, unless it has that name already.

    `registry` supports `name in registry` and `registry.register(cls)`, as BasicSR's.
    """
    registry = ARCH_REGISTRY if registry is None else registry
    if SeemoReFast.__name__ not in registry:
        registry.register(SeemoReFast)


register()
