"""Layers of the package: what may import what, and that no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"seemore_fast": ROOT / "seemore_fast", "seemore_fast.kernels": ROOT / "kernels"}

# Each layer may import from itself and from those below it, and from the layers of its own line only in that order.
LAYERS = [
    ["_torch_compat", "_version", "demo", "devices", "errors", "reference", "torchrun", "weights"],
    ["io", "memory"],
    ["backends"],
    ["kernels"],
    ["ops"],
    ["network"],
    ["upscale"],
    ["evaluation"],
    ["analysis"],
    ["training"],
    ["integrations"],
    ["cli"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
APPLICATIONS = {"demo.__main__", "training.__main__"}  # run, never imported


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if package == "seemore_fast" and relative.parts[0] in ("kernels", "benchmarks"):  # links in a checkout
                continue
            parts = relative.with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Return the package's modules that a module imports anywhere in its code, lazily or not."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, [base if node.level else None, node.module]))
            for alias in node.names:  # a module, or a name in one; `_C` is the extension
                name = f"{source}.{alias.name}"
                found.add(name if name in MODULES or alias.name == "_C" else source)
    return {module for module in found if module in MODULES and module != name}


def layer_of(module: str) -> str:
    return module.removeprefix("seemore_fast").removeprefix(".").partition(".")[0]


IMPORTS = {name: imports_of(name) for name in MODULES}


def test_no_import_cycles():
    """A circle raises CycleError, which names its modules."""
    list(TopologicalSorter(IMPORTS).static_order())


def test_imports_point_downwards():
    errors = []
    for name, imports in IMPORTS.items():
        if name == "seemore_fast" or name.removeprefix("seemore_fast.") in APPLICATIONS:
            continue
        own = layer_of(name)
        for imported in imports:  # the package itself is above all of its modules
            if imported == "seemore_fast" or not (
                layer_of(imported) == own or LEVELS[layer_of(imported)] < LEVELS[own]
            ):
                errors.append(f"{name} imports {imported}, which is not below it")
    assert errors == []
