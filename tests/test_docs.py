"""README and docs: links lead somewhere, commands parse, snippets compile."""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not {".venv", "demo", "build", ".pytest_cache"} & {*path.parts}
)
# Parses each command line as the command does, and prints the first that it refuses.
PARSE = """
import importlib, json, sys
from absl import flags
from pipeline.cli import flag_parsing

module, lines = json.loads(sys.argv.pop())
command = importlib.import_module(module)
beam = module in ("pipeline.preprocess", "pipeline.export")
for line in lines:
    flags.FLAGS.unparse_flags()
    sys.argv = ["command", *line]  # Where the flag of a config looks for the file's name.
    rest = flag_parsing.parse_flags(
        sys.argv, doc="", module=module, beam=beam, arguments=True
    )
    if beam:
        from pipeline.runners import options
        options.parse_options(rest)
"""


def name(path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors(path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*plain}


def links_of(page) -> list[tuple[str, str]]:
    """(target, anchor) of every link of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text)
    return links + re.findall(r"^\[[^\]]+\]: ([^#\s]*)(#\S*)?$", text, re.M)


def test_links_are_found():
    links = [link for page in PAGES for link in links_of(page)]
    assert len(links) > 50 and sum(bool(anchor) for _, anchor in links) >= 3


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in links_of(page):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor[1:] in anchors(path), f"{target}{anchor}"


def command_lines() -> list[list[str]]:
    """The words of every command of the pages: in a block of their own, or between backquotes."""
    commands = []
    for page in PAGES:
        text = re.sub(r"\\\n", " ", page.read_text())
        lines = re.findall(r"^ {4,}(?:\$ )?(?:\w+=\S+ )*(\S.*)$", text, re.M)
        lines += [line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", text)]
        for line in lines:
            if re.match(
                r"vae-[a-z-]+ [-/]|python -m (pipeline|trainer)\.\S+ -"
                r"|make [a-z-]+( +[A-Z_]+=| *(#|$))",
                line,
            ):
                words = shlex.split(re.sub(r"\$\w+", "8", line), comments=True)
                commands.append([word for word in words if word not in ("…", "FLAGS")])
    return commands


def modules() -> dict[str, str]:
    scripts = importlib.metadata.distribution("vae-pipeline").entry_points
    return {script.name: script.value.partition(":")[0] for script in scripts}


def test_commands_take_the_flags_of_the_docs():
    lines: dict[str, list[list[str]]] = {}
    for words in command_lines():
        if words[0] == "make":
            continue
        module = words[2] if words[0] == "python" else modules()[words[0]]
        rest = words[3:] if words[0] == "python" else words[1:]
        lines.setdefault(module, []).append(rest)
    assert len(lines) >= 7 and sum(map(len, lines.values())) >= 15
    for module, arguments in lines.items():
        # The flags of a config file stay defined, so each of them needs a process of its own.
        groups = [[line] for line in arguments] if module == "trainer.main" else [arguments]
        for group in groups:
            done = subprocess.run(
                [sys.executable, "-c", PARSE, json.dumps([module, group])],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (module, group, done.stderr[-400:])


def test_make_has_the_targets_and_variables_of_the_docs():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.M)}
    variables = {*re.findall(r"\b([A-Z_]+)\b", makefile)}
    lines = [words for words in command_lines() if words[0] == "make"]
    assert len(lines) >= 5
    for words in lines:
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            known = variable in variables if equals else word in targets
            assert known, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_compile(page):
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(snippet, name(page), "exec")


def test_readme_is_read_in_five_minutes():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert max(map(len, lines)) < 100
