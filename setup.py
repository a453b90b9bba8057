"""Packages, and the native libraries as far as this machine can build them; see README, "Installing".

SEEMORE_FAST_NATIVE=auto|0|1 (all that is compiled) and SEEMORE_FAST_CUDA=auto|0|1 (the CUDA library): where possible,
not at all, or fail where it is not. CXX, CUDA_HOME, MAX_JOBS and TORCH_CUDA_ARCH_LIST as for other extensions of torch.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402


def attempt(switch, what, find):
    """Return what `find` finds, or None: with one line where something is missing, an error where it is demanded."""
    wanted = os.environ.get(switch, "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{switch} is {wanted!r}, expected auto, 0 or 1")
    try:
        return find() if wanted != "0" else None
    except native.Missing as missing:
        if wanted == "1":
            raise SystemExit(f"{switch}=1, but {missing}") from None
        print(f"seemore-fast: {what} left out: {missing}", file=sys.stderr)


class BuildNative(build_ext):
    """Run ninja once for all libraries, in a folder that is kept, so that the next build does only what changed."""

    def get_ext_filename(self, name):
        # Libraries without Python in them serve every Python: no tag in their names.
        if "libseemore" in name:
            return name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name)

    def build_extensions(self):
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        built = native.build(folder, toolchain, cuda)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built[extension.name.rpartition(".")[2]], target)


toolchain = attempt("SEEMORE_FAST_NATIVE", "the native libraries are", native.find_toolchain)
cuda = attempt("SEEMORE_FAST_CUDA", "the CUDA library is", native.find_cuda) if toolchain else None
if toolchain is None and os.environ.get("SEEMORE_FAST_CUDA") == "1":
    raise SystemExit("SEEMORE_FAST_CUDA=1, but there is no native build to put it in (SEEMORE_FAST_NATIVE)")

setup(
    packages=[*find_packages(include=["seemore_fast*"]), "seemore_fast.kernels", "seemore_fast.benchmarks"],
    # never modules named `kernels` or `benchmarks`
    package_dir={"seemore_fast.kernels": "kernels", "seemore_fast.benchmarks": "benchmarks"},
    ext_modules=[Extension(f"seemore_fast.{name}", sources=[]) for name in native.products(toolchain, cuda)],
    cmdclass={"build_ext": BuildNative},
)
