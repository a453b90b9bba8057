"""Packages, and the native libraries as far as this machine can build them; see README, "Installing".

SEEMORE_FAST_NATIVE=auto|0|1 (all that is compiled) and SEEMORE_FAST_CUDA=auto|0|1 (the CUDA library): where possible,
not at all, or fail where it is not. CXX, CUDA_HOME, MAX_JOBS, NVCC_THREADS and TORCH_CUDA_ARCH_LIST as for other
extensions of torch. What was built, and what was left out and why, is written to seemore_fast/build_info.json.
"""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import native_build as native  # noqa: E402

LIBRARIES = {"SEEMORE_FAST_NATIVE": "libseemore_cpu", "SEEMORE_FAST_CUDA": native.CUDA_LIBRARY}
left_out = {}  # why, by library


def attempt(switch, what, find):
    """Return what `find` finds, or None: with one line where something is missing, an error where it is demanded."""
    wanted = os.environ.get(switch, "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{switch} is {wanted!r}, expected auto, 0 or 1")
    if wanted == "0":
        left_out[LIBRARIES[switch]] = f"switched off by {switch}=0"
        return None
    try:
        return find()
    except native.Missing as missing:
        if wanted == "1":
            raise SystemExit(f"{switch}=1, but {missing}") from None
        left_out[LIBRARIES[switch]] = str(missing)
        print(f"seemore-fast: {what} left out: {missing}", file=sys.stderr)


def write_info(package):
    """Write build_info.json into a folder of the package."""
    built = cuda if native.CUDA_LIBRARY not in left_out else None
    info = {**native.facts(toolchain, built), "left_out": left_out}
    (package / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class BuildPython(build_py):
    """Write build_info.json, which a build without libraries has, too."""

    def run(self):
        super().run()
        write_info((ROOT if self.editable_mode else Path(self.build_lib)) / "seemore_fast")


class BuildNative(build_ext):
    """Run ninja for the libraries, in a folder that is kept, so that the next build does only what changed."""

    def run(self):
        super().run()
        write_info(Path(self.get_ext_fullpath("seemore_fast._")).parent)

    def get_ext_filename(self, name):
        # Libraries without Python in them serve every Python: no tag in their names.
        if "libseemore" in name:
            return name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name)

    def build_extensions(self):
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        try:
            built = native.build(folder, toolchain, cuda, native.products(toolchain, None))
        except native.Missing as missing:
            raise SystemExit(f"seemore-fast: {missing}") from None
        if cuda:  # by itself, so that its failure costs nothing else
            build_alone = partial(native.build, folder, toolchain, cuda, [native.CUDA_LIBRARY])
            built |= attempt("SEEMORE_FAST_CUDA", "the CUDA library is", build_alone) or {}
        self.extensions[:] = [e for e in self.extensions if e.name.rpartition(".")[2] in built]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))  # setuptools replaces those in the tree by it
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built[extension.name.rpartition(".")[2]], target)


toolchain = attempt("SEEMORE_FAST_NATIVE", "the native libraries are", native.find_toolchain)
if toolchain:
    cuda = attempt("SEEMORE_FAST_CUDA", "the CUDA library is", native.find_cuda)
else:
    cuda, left_out[native.CUDA_LIBRARY] = None, left_out["libseemore_cpu"]
    if os.environ.get("SEEMORE_FAST_CUDA") == "1":
        raise SystemExit("SEEMORE_FAST_CUDA=1, but there is no native build to put it in (SEEMORE_FAST_NATIVE)")
if cuda and cuda["dropped"]:
    print(f"seemore-fast: CUDA architectures are left out: {cuda['dropped']}", file=sys.stderr)
    left_out["cuda_architectures"] = cuda["dropped"]

setup(
    packages=[*find_packages(include=["seemore_fast*"]), "seemore_fast.kernels", "seemore_fast.benchmarks"],
    # never modules named `kernels` or `benchmarks`
    package_dir={"seemore_fast.kernels": "kernels", "seemore_fast.benchmarks": "benchmarks"},
    ext_modules=[Extension(f"seemore_fast.{name}", sources=[]) for name in native.products(toolchain, cuda)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
