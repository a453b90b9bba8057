"""SeemoRe for spandrel: after `install()`, its ModelLoader loads SeemoRe checkpoints into this package's network.

They are detected as the architecture "SeemoReFast", just before spandrel's own "SeemoRe", which stays in the registry.
For a descriptor that is already loaded, `seemore_fast.accelerate(descriptor)` is enough.
"""

from ..network.accelerate import accelerate
from ..network.model import SeemoRe

try:
    from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor, ModelTiling
    from spandrel.architectures.SeemoRe import SeemoReArch
except ImportError as error:
    raise ImportError(
        f"seemore_fast.integrations.spandrel needs spandrel 0.4 or later: pip install spandrel. The error: {error}"
    ) from error


class SeemoReFastArch(Architecture[SeemoRe]):
    """Architecture that detects the checkpoints of spandrel's SeemoRe and runs them in `seemore_fast.SeemoRe`."""

    def __init__(self):
        self._published = SeemoReArch()
        super().__init__(id="SeemoReFast", detect=self._published.detect)

    def load(self, state_dict: dict) -> ImageModelDescriptor[SeemoRe]:
        """Return spandrel's descriptor with this network, which accepts images of any size, and float16.

        The network pools over the whole image: tiling is possible but changes the result.
        """
        published = self._published.load(state_dict)
        return ImageModelDescriptor(
            accelerate(published),
            state_dict,
            architecture=self,
            purpose=published.purpose,
            tags=published.tags,
            supports_half=True,
            supports_bfloat16=True,
            scale=published.scale,
            input_channels=published.input_channels,
            output_channels=published.output_channels,
            tiling=ModelTiling.DISCOURAGED,
            call_fn=lambda model, image: model(image).to(image.dtype),  # the network itself returns at least float32
        )


def install(registry: ArchRegistry | None = None):
    """Add the architecture to `registry`, by default spandrel's MAIN_REGISTRY, unless it has it already."""
    registry = MAIN_REGISTRY if registry is None else registry
    support = ArchSupport.from_architecture(SeemoReFastArch(), before=("SeemoRe",))
    registry.add(support, ignore_duplicates=True)
