"""SeemoRe for BasicSR: importing this module lets `network_g: type: SeemoReFast` in a yml build this package's network.

The other options of `network_g` stay those of the published SeemoRe, and so do the checkpoints. Import it before the
network is built: at the top of the script that calls `basicsr.train.train_pipeline`, or as the one line of a new file
`basicsr/archs/seemore_fast_arch.py`. A fork whose package is called `basicsr` too, such as the published SeemoRe
repository, is served by the import alone; for a further registry call `register`. A framework whose package has another
name needs no BasicSR and not this module: give its registry a subclass of `seemore_fast.SeemoRe`.
"""

from ..network.model import SeemoRe

try:
    from basicsr.utils.registry import ARCH_REGISTRY
except ImportError as error:
    raise ImportError(
        "seemore_fast.integrations.basicsr needs BasicSR: pip install basicsr, or put a fork that provides the package "
        "basicsr on the path. BasicSR 1.4.2 itself fails beside torchvision 0.17 and later, until its "
        "data/degradations.py imports rgb_to_grayscale from torchvision.transforms.functional. "
        f"What failed: {error}"
    ) from error


class SeemoReFast(SeemoRe):
    """`seemore_fast.SeemoRe` under the name that a yml gives: a fork's own SeemoRe stays beside it."""


def register(registry=None):
    """Put `SeemoReFast` into `registry`, by default BasicSR's ARCH_REGISTRY, unless the name is there already.

    `registry` is one in the style of BasicSR: `name in registry` and `registry.register(cls)`.
    """
    registry = ARCH_REGISTRY if registry is None else registry
    if SeemoReFast.__name__ not in registry:
        registry.register(SeemoReFast)


register()
