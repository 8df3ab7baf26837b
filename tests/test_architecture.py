"""Imports run one way: no circle between the rooms of the package, nor between its packages."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"gdfq_ext": ROOT / "gdfq_ext", "gdfq": ROOT / "python/gdfq", "benchmarks": ROOT / "benchmarks"}
MOST_LINES = 450


def imported(path: Path, package: str) -> set[str]:
    """Modules that a file imports, functions' own imports included, as `gdfq.graph.capture`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package, node.module])) if node.level else node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """The file or folder directly below the package."""
    return ".".join(module.split(".")[:2])


def test_no_circle_between_rooms():
    graph: dict[str, set[str]] = {}
    rooms = {f"gdfq.{path.stem}" for path in PACKAGES["gdfq"].iterdir()} - {"gdfq.__init__"}
    for path in PACKAGES["gdfq"].rglob("*.py"):
        own = room(".".join(["gdfq", *path.relative_to(PACKAGES["gdfq"]).with_suffix("").parts]))
        if own in rooms:
            graph.setdefault(own, set()).update({room(name) for name in imported(path, "gdfq")} & (rooms - {own}))
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("gdfq.config") < order.index("gdfq.graph") < order.index("gdfq.images")
    assert (
        order.index("gdfq.images") < order.index("gdfq.train") < order.index("gdfq.methods") < order.index("gdfq.api")
    )


def test_packages_know_only_those_below():
    for package, allowed in (("gdfq_ext", {"gdfq_ext"}), ("gdfq", {"gdfq_ext", "gdfq"})):
        for path in PACKAGES[package].rglob("*.py"):
            others = {name.split(".")[0] for name in imported(path, package)} & PACKAGES.keys()
            assert others <= allowed, path


def test_the_trainer_does_not_know_where_images_come_from_nor_what_a_method_is():
    names = imported(PACKAGES["gdfq"] / "train/trainer.py", "gdfq")
    assert {name for name in names if name.startswith("gdfq.images")} == {"gdfq.images.source.ImageSource"}
    assert not any(name.startswith(("gdfq.methods", "gdfq.run", "torch.distributed")) for name in names)


def test_files_are_short():
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= MOST_LINES, path
