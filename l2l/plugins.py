"""Code of users: modules by their dotted names, and Python files by their paths."""

import hashlib
import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SUFFIX = ".py"


def load_module(name: str, what: str) -> ModuleType:
    """The module of a dotted name (``package.module``), or of a file (``./module.py``), which is loaded once per content.

    Args:
        what: opens the message of an error: ``method './x.py'``.

    Raises:
        ValueError: there is none, or it cannot be imported, whatever it raises: the message says what and in which line.
    """
    try:
        return _of_file(Path(name).expanduser().resolve()) if name.endswith(SUFFIX) else import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: no module {name!r} can be imported ({error})") from error
    except FileNotFoundError as error:
        raise ValueError(f"{what}: there is no file {error.filename!r}") from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" at {last.filename}:{last.lineno}"
        raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {error}{where}") from error


def _of_file(path: Path) -> ModuleType:
    content = path.read_bytes() + str(path).encode()
    name = f"{path.stem}_{hashlib.blake2b(content, digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the suffix is that of a module"
    sys.modules[name] = module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    return sys.modules[name]
