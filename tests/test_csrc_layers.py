"""The layers of csrc: what a folder may include stands in csrc/README.md."""

import re
from collections import Counter

from helpers import CSRC, ROOT

HOST = ROOT / "tests/helpers/cuda_host"  # what the CUDA sources include where they run on the CPU
SOURCES = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".def")]
INCLUDED = {path: re.findall(r'#\s*include "([^"]+)"', path.read_text()) for path in SOURCES}
HEADERS = [path for path in SOURCES if path.suffix in (".h", ".def")]


def layers() -> dict[str, set[str]]:
    """Return what each folder may include besides its own headers."""
    rows = re.findall(r"^\| `([\w/]+)` \|.*\|([^|]*)\|$", (CSRC / "README.md").read_text(), re.MULTILINE)
    return {folder: set(re.findall(r"`([\w/]+)`", others)) for folder, others in rows}


def folder_of(path) -> str:
    return path.relative_to(CSRC).parent.as_posix()


def test_every_folder_has_a_row():
    assert {folder_of(path) for path in SOURCES} - {"."} == layers().keys()
    assert {folder for others in layers().values() for folder in others} <= layers().keys()


def test_sources_include_layers_below_their_own():
    allowed, errors = layers(), []
    for source in SOURCES:
        folder = folder_of(source)
        for name in INCLUDED[source]:
            if (HOST / name).exists():
                continue
            if not (CSRC / name).exists():
                errors.append(f"{source}: {name} is no path from csrc/")
            elif folder_of(CSRC / name) not in allowed[folder] | {folder}:
                errors.append(f"{source}: {name} is not of {', '.join(sorted(allowed[folder]))}")
    assert errors == []


def test_no_two_headers_have_one_name():
    names = Counter(path.name for path in [*HEADERS, *HOST.glob("*.h")])
    assert [name for name, count in names.items() if count > 1] == []


def test_every_header_is_included():
    included = {name for names in INCLUDED.values() for name in names}
    by_device = {"bindings/cpu_device.h", "bindings/cuda_device.h"}  # by SEEMORE_DEVICE
    assert {path.relative_to(CSRC).as_posix() for path in HEADERS} - included == by_device
