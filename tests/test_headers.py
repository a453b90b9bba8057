"""The bindings compile with every torch that pyproject.toml promises: the oldest, the tested one and the newest."""

import subprocess

import pytest
from helpers.native_build import native
from helpers.torch_headers import folder_of, versions

# The one that broke before is cheap enough for every run.
CASES = [
    pytest.param(name, device, marks=[] if (name, device) == ("oldest", "cuda") else pytest.mark.slow)
    for name in versions()
    for device in ("cpu", "cuda")
]


@pytest.mark.parametrize("name, device", CASES)
def test_bindings_compile_with_headers(name, device):
    version = versions()[name]
    if not folder_of(version).exists():
        pytest.skip(f"no headers of torch {version}: python tests/helpers/torch_headers.py gets them")
    try:
        compiler = native.find_compiler()
    except native.Missing as missing:
        pytest.skip(str(missing))
    flags = [*native.CXXFLAGS, *native.flags_with_torch(device, folder_of(version), ["portable"])]
    sources = [native.CSRC / source for source in native.sources_with_torch(device)]
    assert len(sources) >= 6
    done = subprocess.run([*compiler, *flags, "-fsyntax-only", *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_oldest_version_is_the_one_that_libraries_are_built_for():
    assert versions()["oldest"] == "{}.{}".format(*native.oldest_torch())
