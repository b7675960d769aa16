"""The architecture as a test: imports without circles, who may import whom, what importing costs, how large it all is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "l2l"
LINES, FILES, IMPORT_SHARE = 40_000, 210, 0.06
"""Limits: lines of Python, files of Python, share of the lines that belong to import statements."""

LEAVES = {"noise", "models", "report", "aliases", "arguments", "interrupts", "plugins"}
"""They know nothing of the other parts."""
METHODS = LEAVES | {"params", "estimators", "tuners", "methods"}
TRAINING = METHODS | {"tasks", "bad_loss", "optim", "optimizers", "costs"}
MAY_IMPORT: dict[str, set[str]] = {
    **{part: set() for part in LEAVES},
    "noise": {"interrupts"},
    "models": {"arguments"},
    "tasks": {"arguments", "models", "report"},
    "params": {"noise", "interrupts", "models"},
    "estimators": {"noise", "params"},
    "tuners": LEAVES | {"params"},
    "methods": LEAVES | {"params", "estimators", "tuners"},
    "bad_loss": {"estimators"},
    "optim": METHODS | {"bad_loss", "optimizers"},  # each by its name, l2l.optim.FZOO, when it is asked for
    "optimizers": METHODS | {"optim"},
    "costs": METHODS | {"tasks"},
    "parallel": METHODS | {"optim"},
    "train": TRAINING | {"parallel"},
    "meta": TRAINING | {"train"},
    "experiments": TRAINING | {"train", "meta"},
    "integrations": TRAINING | {"train"},
    "tools": TRAINING | {"train", "meta"},
    "tuner_commands": TRAINING | {"experiments"},
    "cli": {"aliases", "arguments", ""},
    "__main__": {"cli"},
    "": TRAINING | {"optimizers", "train", "meta", "experiments"},
}
"""Part of the package (the nameless one is ``l2l/__init__.py``) -> the other parts that it may import, in functions too."""

HEAVY = ("transformers", "datasets", "lightning", "matplotlib", "pandas", "tensorboard", "huggingface_hub")


def module_of(path: Path) -> str:
    return ".".join(["l2l", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """``l2l.methods.mezo`` belongs to ``methods``; ``l2l`` itself to the nameless part."""
    return module.split(".")[1] if "." in module else ""


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text())


def run_at_import(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that importing a module runs: not those inside functions, and not those for type checkers alone."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield statement
        checkers = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
        for name in ("orelse",) if checkers else ("body", "orelse", "finalbody"):
            yield from run_at_import(getattr(statement, name, ()))
        for handler in getattr(statement, "handlers", ()):
            yield from run_at_import(handler.body)


def imported(module: str, nodes: Iterable[ast.AST]) -> set[str]:
    """Modules of the package that import statements among these nodes import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "l2l"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write it in full"
            if node.module and node.module.split(".")[0] == "l2l":
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found |= {name if name in SOURCES else node.module for name in inner}
    return found


def test_modules_import_each_other_in_no_circle():
    graph = {module: imported(module, run_at_import(tree_of(module).body)) - {module} for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_a_circle_would_be_found_and_imports_for_type_checkers_make_none():
    lazy = "if TYPE_CHECKING:\n    import l2l.meta\ndef f():\n    import l2l.noise\n"
    code = f"import l2l.cli\n{lazy}class A:\n    import l2l.optim\n"
    assert imported("a", run_at_import(ast.parse(code).body)) == {"l2l.cli", "l2l.optim"}
    assert imported("a", ast.walk(ast.parse(code))) == {"l2l.cli", "l2l.meta", "l2l.noise", "l2l.optim"}


def test_every_part_of_the_package_has_its_row_in_the_table():
    assert {part_of(module) for module in SOURCES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_down(part: str):
    upward = [
        f"{module} imports {name}"
        for module in SOURCES
        if part_of(module) == part
        for name in sorted(imported(module, ast.walk(tree_of(module))))
        if part_of(name) not in {part, *MAY_IMPORT[part]}
    ]
    assert upward == []


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_of_the_package_is_imported_by_a_string_of_its_name(module: str):
    named = [
        ast.unparse(node)
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
        and any(
            isinstance(word, ast.Constant) and str(word.value).startswith("l2l")
            for argument in node.args
            for word in ast.walk(argument)
        )
    ]
    assert named == []


def test_the_package_stays_small():
    lines = {module: path.read_text().count("\n") for module, path in SOURCES.items()}
    imports = sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for module in SOURCES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    total = sum(lines.values())
    assert total <= LINES
    assert len(lines) <= FILES
    assert imports <= IMPORT_SHARE * total, f"{imports} of {total} lines are imports"


WATCH = f"""
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("socket.", "subprocess.")) else None)
import l2l
print([name for name in {HEAVY!r} if name in sys.modules])
print(seen)
"""


def test_importing_the_package_imports_nothing_heavy_opens_no_socket_and_starts_no_compiler():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCH],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]


def undocumented(module: str) -> Iterator[str]:
    """Public modules, classes and functions without a docstring. Overrides are documented by what they override."""
    tree = tree_of(module)
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


@pytest.mark.parametrize("module", SOURCES)
def test_everything_public_has_a_docstring(module: str):
    assert list(undocumented(module)) == []


@pytest.mark.parametrize("module", SOURCES)
def test_no_file_of_weights_or_code_of_others_is_ever_executed(module: str):
    """Kind B4 of issue 16: nothing is pickled or unpickled, and code that comes with a model runs by the user's word alone."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not named & {"pickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code", "False") in ("False", "config.trust_remote_code")  # the user's word
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "torch.hub.load", "eval", "exec", "pickle.load", "pickle.loads")
            assert called not in ("yaml.load", "yaml.unsafe_load", "shutil.unpack_archive")
            assert not called.endswith((".extractall", ".extract", ".load_from_checkpoint"))
            assert given.get("allow_pickle", "False") == "False"
