"""What can be read off the sources of Triton's kernels, on every machine."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from seemore_fast import kernels

FOLDER = Path(kernels.__path__[0])
each_source = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)


def calls(source: str, name: str) -> Iterator[ast.Call]:
    """Yield the calls of tl.<name> in a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}":
            yield node


def loads_of_anything(source: str) -> list[int]:
    """Return the lines of loads that are masked but do not say what stands where nothing is loaded."""
    given = ((call, {keyword.arg for keyword in call.keywords}) for call in calls(source, "load"))
    return [call.lineno for call, names in given if ("mask" in names or len(call.args) > 1) and "other" not in names]


@each_source
def test_masked_loads_say_what_stands_for_the_rest(path):
    """Else it is anything, and a product takes it in."""
    assert not loads_of_anything(path.read_text())


def test_a_load_of_anything_is_seen():
    assert loads_of_anything("tl.load(p)\ntl.load(p, mask=m)\ntl.load(p, m)\ntl.load(p, mask=m, other=0)") == [2, 3]


@each_source
def test_nothing_waits_for_the_gpu_or_adds_in_any_order(path):
    source = path.read_text()
    for forbidden in ("atomic", ".item()", ".cpu()", ".tolist()", "synchronize"):
        assert forbidden not in source, forbidden


def test_the_table_is_whole():
    """Every architecture has every kernel, for few and for many channels."""
    configurations = pytest.importorskip("seemore_fast.kernels.configurations")
    table = json.loads((FOLDER / "configurations.json").read_text())
    known = {name for kernels in table.values() for name in kernels}
    assert "80" in table  # what all others fall back on
    for architecture, entries in table.items():
        assert set(entries) == known, architecture
        for name, sizes in entries.items():
            plain = {size for size in sizes if "," not in size}
            assert plain and set(sizes) == plain | {f"{size}, many channels" for size in plain}, name
            for pixels, warps, stages, registers in (configurations.Configuration(*of) for of in sizes.values()):
                assert pixels >= 16 and pixels.bit_count() == warps.bit_count() == 1, name
                assert stages >= 1 and registers in range(256), name


def test_a_new_architecture_gets_what_is_known_of_an_older_one(monkeypatch):
    configurations = pytest.importorskip("seemore_fast.kernels.configurations")
    one = {"kernel": {"2 bytes": [64, 4]}}
    monkeypatch.setattr(configurations, "table", lambda: {"80": one, "90": {"kernel": {"2 bytes": [32, 8, 2]}}})
    found = [configurations.choose("kernel", architecture, 2, 36) for architecture in (80, 89, 90, 103)]
    assert found == [(64, 4, 1, 0)] * 2 + [(32, 8, 2, 0)] * 2


def test_an_architecture_without_matrix_units_is_refused():
    """Triton multiplies no matrices by those of sm_75: all would be sums of single products, and spill."""
    configurations = pytest.importorskip("seemore_fast.kernels.configurations")
    with pytest.raises(ValueError, match=r"^products: no configuration for sm_75, expected sm_80 or newer"):
        configurations.choose("products", 75, 2, 36)
