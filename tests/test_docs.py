"""The pages of `docs/`: commands exist, Python parses and names what there is, links lead somewhere, the maths is complete.

The site itself is built, strictly, by `make docs`, which needs the extra `docs`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import l2l
from l2l.cli import main
from l2l.optimizers import optimizer_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, alternatives separated by `|`."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The different `l2l` commands of the guides' shell blocks; a backslash at a line's end continues it."""
    text = "\n".join(block for page in GUIDES for block in blocks(page, "bash|sh|")).replace("\\\n", " ")
    return sorted({line.partition(" #")[0].strip() for line in text.splitlines() if line.startswith("l2l ")})


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_guides_exists_with_its_flags(line: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as leaving:  # it parses, prints what it would run, and leaves
        main([*shlex.split(line)[1:], "--print_config"])
    assert leaving.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_python_of_the_guides_parses_and_names_what_there_is(page: Path):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "l2l":
                assert node.attr in l2l.__all__, f"l2l.{node.attr} is not public"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "l2l":
                module = importlib.import_module(node.module or "")
                public = {*getattr(module, "__all__", ()), *dir(module)}  # those of extras are imported when they are asked for
                assert public >= {alias.name for alias in node.names}, ast.unparse(node)


def test_names_on_the_page_on_methods_are_those_of_the_code():
    """What the page writes as `Direction.x`, `theta.x` and so on exists."""
    from l2l.methods.base import LossEvaluator, StepContext
    from l2l.params import Direction, PerturbedParameters

    kinds = {"Direction": Direction, "StepContext": StepContext, "context": StepContext}
    kinds |= {"theta": PerturbedParameters, "evaluator": LossEvaluator}
    text = (DOCS / "add-a-method.md").read_text()
    named = set(re.findall(r"\b(Direction|StepContext|context|theta|evaluator)\.([a-z_]+)", text))
    assert len(named) > 10
    missing = [f"{owner}.{name}" for owner, name in named if name not in {*dir(kinds[owner]), *_fields(kinds[owner])}]
    assert missing == []


def _fields(kind: type) -> set[str]:
    return {field.name for field in fields(kind)} if is_dataclass(kind) else set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(((?!\w+:)[^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_guide_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entries: list) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]

    named = [page for page in pages(nav) if page.endswith(".md")]
    assert sorted(named) == [page.name for page in GUIDES]


def test_the_reference_has_everything_public():
    shown = re.findall(r"^::: l2l\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert "optimizers" in shown  # the page of every method as an optimizer
    assert sorted(set(shown) - {"optimizers"}) == sorted(set(l2l.__all__) - set(optimizer_names()))


def script_of(name: str) -> Any:
    """A script of the site, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_maths_page_has_every_method_with_what_it_declares():
    """The lines below each name are those that the script writes; it refuses a page that lacks a method."""
    script = script_of("methods_page")
    text = (DOCS / "methods.md").read_text()
    assert script.written(text) == text, "run: python docs/site/methods_page.py"
    with pytest.raises(ValueError, match="mezo"):
        script.written(text.replace("### mezo\n", "### mezzo\n"))


def test_the_scale_page_has_the_tables_of_the_arithmetic():
    """Of one model; all of them are slow to size."""
    script, text = script_of("scale_page"), (DOCS / "scale.md").read_text()
    found = script.needs(["opt-125m-shape"])
    one = script.tables(found)
    assert one["fits"].splitlines()[-1] in text
    row = next(line for line in text.splitlines() if line.startswith("| AdamW full |") and "bytes" not in line)
    assert f"{found['opt-125m-shape']['AdamW full'] / 1e9:.2f}" in row
    with pytest.raises(ValueError, match="0 places for the table 'fits'"):
        script.written(text.replace("<!-- fits", "<!-- fit"), found)


@pytest.mark.slow
def test_the_scale_page_is_current():
    script, text = script_of("scale_page"), (DOCS / "scale.md").read_text()
    assert script.written(text, script.needs()) == text, "run: python docs/site/scale_page.py"


def test_every_method_that_takes_steps_has_its_equation():
    text = (DOCS / "methods.md").read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    without = {section.split("\n", 1)[0] for section in sections if "$$" not in section}
    assert without == {"zero_shot", "icl"}, "these take no steps; every other has an update to show"


def test_the_examples_that_the_home_page_lists_are_those_there_are():
    listed = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
