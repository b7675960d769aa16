"""The architecture as a test: who may import whom, what importing costs, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "l2l"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ENGINE = {"noise", "blocks", "perturb", "estimators", "tuners", "methods", "enhancements"}
LEAVES = {"tasks", "models", "report", "world"}
MAY_IMPORT: dict[str, set[str]] = {
    "noise": set(),
    "blocks": set(),
    "world": set(),
    "models": set(),
    "report": set(),
    "tasks": {"world", "models"},
    "perturb": {"noise", "blocks"},
    "estimators": {"noise", "blocks", "perturb"},
    "tuners": {"blocks", "noise", "perturb"},
    "methods": {"noise", "blocks", "perturb", "estimators", "tuners"},
    "enhancements": {"noise", "blocks", "perturb", "estimators", "tuners", "methods"},
    "estimate": ENGINE | LEAVES,
    "finetune": ENGINE | LEAVES | {"estimate"},
    "meta": ENGINE | LEAVES | {"finetune"},
    "bench": ENGINE | LEAVES | {"finetune"},
    "probe": ENGINE | LEAVES | {"finetune"},
    "compare": ENGINE | LEAVES | {"finetune", "meta"},
}
"""Part of the package -> the other parts it may import. Parts that are not here may import anything."""

MAY_IMPORT_ANYTHING = {"", "cli", "commands", "tuner_commands", "__main__"}
ONLY_MODULES = {
    ("tasks", "models"): {"l2l.models.batching", "l2l.models.heads", "l2l.models.load", "l2l.models.prompt_trees"}
}
"""Of that other part, only these modules."""

HEAVY = ("transformers", "datasets", "lightning", "matplotlib", "pandas", "tensorboard", "huggingface_hub")


def part_of(module: str) -> str:
    """``l2l.methods.mezo`` belongs to ``methods``; ``l2l`` itself to the nameless part."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    return ".".join(["l2l", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it, by statement or by ``import_module("l2l.…")``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "l2l")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import: write it in full"
            if node.module and node.module.split(".")[0] == "l2l":
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if is_module(name) else node.module for name in inner)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            target = node.args[0]
            if isinstance(target, ast.Constant) and str(target.value).startswith("l2l."):
                yield str(target.value)


def test_every_part_of_the_package_has_its_row_in_the_table():
    parts = {part_of(module_of(path)) for path in SOURCES}
    assert parts <= MAY_IMPORT.keys() | MAY_IMPORT_ANYTHING


def test_the_table_has_no_circle():
    remaining = dict(MAY_IMPORT)
    while remaining:
        free = [part for part, others in remaining.items() if not others & remaining.keys()]
        assert free, f"these parts import each other in a circle: {sorted(remaining)}"
        for part in free:
            del remaining[part]


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_down(part: str):
    for path in SOURCES:
        if part_of(module_of(path)) != part:
            continue
        for name in imported(path):
            other = part_of(name)
            assert other == part or other in MAY_IMPORT[part], f"{module_of(path)} imports {name}"
            allowed = ONLY_MODULES.get((part, other), {name})
            assert name in allowed, f"{module_of(path)} imports {name}; only {allowed} may be"


WATCH = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("socket.", "subprocess.")) else None)
import l2l
print([name for name in {heavy!r} if name in sys.modules])
print(seen)
"""


def test_importing_the_package_imports_nothing_heavy_opens_no_socket_and_starts_no_compiler():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCH.format(heavy=HEAVY)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes and functions without a docstring. Overrides speak through what they override."""
    tree = ast.parse(path.read_text())
    if tree.body and ast.get_docstring(tree) is None:
        yield "the module itself"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_"]
            yield from (f"{node.name}.{inner.name}" for inner in methods if ast.get_docstring(inner) is None)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_everything_public_has_a_docstring(path: Path):
    assert not list(undocumented(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_file_of_weights_or_code_of_others_is_ever_executed(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib", "cloudpickle"}
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code", "False") in ("False", "config.trust_remote_code")  # the user's word
            if ast.unparse(node.func) == "torch.load":
                assert given.get("weights_only", "True") == "True"
