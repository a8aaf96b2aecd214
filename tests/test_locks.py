"""locks/ pins what setup.py needs, with hashes, in the versions of constraints.txt."""

import ast
import importlib.metadata
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
_PIN = re.compile(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)


def lock(python: str) -> dict[str, str]:
    """Name -> version; every line is a comment, or a pin with hashes."""
    text = (REPOSITORY / "locks" / f"python{python}.txt").read_text()
    assert not re.sub(r"^#.*\n", "", _PIN.sub("", text), flags=re.M)
    return {canonicalize_name(name): version for name, version, _ in _PIN.findall(text)}


def setup_argument(name: str):
    """The value of a keyword of setup.py."""
    [call] = [
        node
        for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setuptools.setup"
    ]
    [value] = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(value)


def applies(requirement: Requirement, python: str, extra: str = "") -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
    return not requirement.marker or requirement.marker.evaluate(environment)


def constraints(python: str) -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if applies(pin, python)
    }


def needed() -> list[Requirement]:
    return list(map(Requirement, setup_argument("install_requires")))


@pytest.mark.parametrize("python", VERSIONS)
def test_a_lock_has_the_versions_of_constraints(python):
    assert lock(python).items() <= constraints(python).items()


@pytest.mark.parametrize("python", VERSIONS)
def test_a_lock_has_what_setup_needs(python):
    pins = lock(python)
    for requirement in needed():
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name}: not in the lock; run make lock"
            assert pins[name] in requirement.specifier


def test_a_lock_is_complete():
    """What the packages need that are needed, for the running Python."""
    python = "{}.{}".format(*sys.version_info)
    found, todo = set(), [(requirement, "") for requirement in needed()]
    while todo:
        requirement, extra = todo.pop()
        if not applies(requirement, python, extra):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras} - {seen for n, seen in found if n == name}:
            found.add((name, wanted))
            lines = importlib.metadata.requires(name) or ()
            todo += [(Requirement(line), wanted) for line in lines]
    assert {name for name, _ in found} == lock(python).keys()


def test_each_python_of_setup_has_a_lock():
    assert setup_argument("python_requires") == ">=3.10,<3.14"
    assert {path.name for path in (REPOSITORY / "locks").iterdir()} == {
        f"python{python}.txt" for python in VERSIONS
    }
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"PYTHONS := {' '.join(VERSIONS)}\n" in makefile
