"""The rules of the house: what may import what, and how much a folder holds."""

import ast
import graphlib

import pytest

from tests.conftest import REPOSITORY

# From the top floor down: a room may import what stands below it, and what is in it. The first of
# each are the commands, which are modules of the package itself and do not import each other.
FLOORS = {
    "pipeline": [
        # Flags belong to the commands, wherever they stand.
        *("pipeline", "pipeline.embeddings.flags", "pipeline.sources.flags", "pipeline.api"),
        *("pipeline.reports", "pipeline.embeddings", "pipeline.datasets.building"),
        *("pipeline.datasets.profile", "pipeline.datasets", "pipeline.runners"),
        *("pipeline.sources", "pipeline.stages", "pipeline.formats", "pipeline.storage"),
        *("pipeline.machine", "pipeline.cli"),
    ],
    "trainer": [
        *("trainer", "trainer.api", "trainer.comparison", "trainer.runs", "trainer.steps"),
        *("trainer.cluster", "trainer.data", "trainer.model"),
    ],
}
# What the trainer may import of the pipeline.
SHARED = [
    *("pipeline.datasets.reader", "pipeline.stages", "pipeline.formats", "pipeline.storage"),
    *("pipeline.machine", "pipeline.cli"),
]
MOST_ENTRIES = 12
FILES = [path for top in FLOORS for path in sorted((REPOSITORY / top).rglob("*.py"))]
TREES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(
        ".__init__"
    ): ast.parse(path.read_text())
    for path in FILES
}


def imports(module: str, *, at_start: bool = False) -> set[str]:
    """What a module imports; `at_start`: what its own import brings along."""
    found, todo = set(), list(TREES[module].body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in names}
        elif not at_start or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


ARROWS = {module: imports(module) for module in TREES}


def is_in(module: str, *packages: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("top", FLOORS)
def test_arrows_point_down(top):
    def floor(module):
        return FLOORS[top].index(max((f for f in FLOORS[top] if is_in(module, f)), key=len))

    for module in (module for module in ARROWS if is_in(module, top)):
        for other in (other for other in ARROWS[module] if is_in(other, top)):
            is_down = floor(other) > floor(module) or floor(other) == floor(module) > 0
            assert is_down, f"{module} imports {other}"


def test_no_circles():
    ours = {module: others & TREES.keys() for module, others in ARROWS.items()}
    graphlib.TopologicalSorter(ours).prepare()  # Its error names the circle.


def test_the_pipeline_knows_no_trainer_and_the_trainer_little_of_the_pipeline():
    for module, others in ARROWS.items():
        for other in others:
            if is_in(module, "pipeline"):
                is_right = not is_in(other, "trainer")
            else:
                is_right = is_in(other, *SHARED) or not is_in(other, "pipeline", "apache_beam")
            assert is_right, f"{module} imports {other}"


def test_importing_the_trainer_imports_no_beam():
    seen, todo = set(), [module for module in TREES if is_in(module, "trainer")]
    while todo:
        module = todo.pop()
        if module in TREES and module not in seen:
            seen.add(module)
            others = imports(module, at_start=True)
            assert not any(is_in(other, "apache_beam") for other in others), module
            todo += [*others, module.rpartition(".")[0]]


@pytest.mark.parametrize("top", FLOORS)
def test_a_folder_is_seen_at_a_glance(top):
    for folder in {
        path.parent for path in FILES if is_in(path.relative_to(REPOSITORY).parts[0], top)
    }:
        entries = {
            entry.name for entry in folder.iterdir() if not entry.name.startswith(("_", "."))
        }
        if folder == REPOSITORY / top:
            entries = {name for name in entries if not name.endswith(".py")}  # The commands.
        assert len(entries) <= MOST_ENTRIES, (folder, entries)
