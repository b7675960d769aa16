"""Method objects from what a user names, and the table of methods that ``l2l methods list`` prints."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

from torch import nn

from l2l.aliases import renamed
from l2l.methods import method_class, method_names
from l2l.methods.base import Estimator, FirstOrder, Method, Wrapper
from l2l.methods.wrappers import AROUND, split_method_args, wrapper_class, wrapper_names
from l2l.tuners import Level, Tuner

MethodLike: TypeAlias = str | Method[Any] | FirstOrder[Any] | type[Any] | Callable[..., Any]
"""A name (``"mezo"``, ``"learned+lozo"``, ``"my_package.my_method"``), a method object, a method class, or an optimizer of
:mod:`l2l.optimizers` (``l2l.MeZO``)."""


def method_name(method: MethodLike) -> str:
    """The name that a run records.

    Raises:
        ValueError: it is nothing that names a method.
    """
    if isinstance(method, str):
        return method
    kind = getattr(method, "method_class", method if isinstance(method, type) else type(method))
    if not issubclass(kind, Method | FirstOrder):
        raise ValueError(f"method {method!r} is not a name, a method, a method class, or one of l2l's optimizers")
    own = kind.__module__.rpartition(".")[2]
    inner = getattr(method, "inner", None)
    return own if inner is None else f"{own}{AROUND}{method_name(inner)}"


def check_estimator(method: MethodLike, estimator: Estimator | None, num_directions: int | None) -> None:
    """Raise ValueError where the method, of a composed one the innermost, does not leave open what is chosen (not None)."""
    method = innermost(method)
    name = method_name(method).split(AROUND)[-1]
    kind: Any = method_class(name) if isinstance(method, str) else getattr(method, "method_class", method)
    free = {field.name for field in fields(kind) if field.init}
    for field, value in (("estimator", estimator), ("num_directions", num_directions)):
        if value is not None and field not in free:
            raise ValueError(f"{field}={value!r} is no choice with method {name!r}, which has its own way: leave {field} out")


def with_estimator(method: Any, estimator: Estimator | None, num_directions: int | None) -> Any:
    """The method object with another estimator or number of directions, None leaving them; of a composed one, the innermost.

    Raises:
        ValueError: see :func:`check_estimator`; or the value is out of range.
    """
    check_estimator(method, estimator, num_directions)
    if isinstance(method, Wrapper):
        return replace(method, inner=with_estimator(method.inner, estimator, num_directions))
    given = {"estimator": estimator, "num_directions": num_directions}
    return replace(method, **{field: value for field, value in given.items() if value is not None})


def innermost(method: Any) -> Any:
    """The method object that wrappers are around."""
    while isinstance(method, Wrapper):
        method = method.inner
    return method


def with_top_blocks(method: Any, names: Sequence[str]) -> Any:
    """The method object, of a composed one the innermost, with ``top_blocks`` where it has none."""
    if isinstance(method, Wrapper):
        return replace(method, inner=with_top_blocks(method.inner, names))
    return method if method.top_blocks else replace(method, top_blocks=tuple(names))


def takes_tuner(name: str) -> bool:
    """Whether the method of that name, or one around it, has a sigma from a tuner; ValueError where there is none."""
    *around, base = name.split(AROUND)
    return any("tuner" in inspect.signature(kind).parameters for kind in (method_class(base), *map(wrapper_class, around)))


def build_method(
    method: MethodLike,
    epsilon: float,
    args: Mapping[str, Any],
    tuner: Tuner | str | None,
    model: nn.Module,
    steps: int | None = None,
    match: Level = "exact",
) -> Method[Any] | FirstOrder[Any]:
    """The method object.

    Args:
        args: fields of the method; of a composed name by part, ``{lozo: {rank: 2}}``.
        steps: of the run: the default of a method's ``horizon``.
        match: how alike the model must be to the tuner's own; see :func:`l2l.tuners.transfer.matched`.

    Raises:
        ValueError: an unknown name or argument, a tuner missing, superfluous, or made for another model.
    """
    if isinstance(method, Method | FirstOrder):
        return method
    name = method_name(method)
    *around, base = name.split(AROUND)
    given = split_method_args(name, args)
    given_class = method if isinstance(method, type) else getattr(method, "method_class", None)
    kinds: list[tuple[str, Any]] = [(base, given_class or method_class(base))]
    kinds += [(wrapper, wrapper_class(wrapper)) for wrapper in reversed(around)]
    known = {part: set(inspect.signature(kind).parameters) for part, kind in kinds}
    wanted = any("tuner" in fields for fields in known.values())
    if tuner is None and wanted:
        raise ValueError(f"method {name!r} needs a tuner: give its directory, bundled name or hub id")
    if tuner is not None and not wanted:
        instead = "learned" if name == "mezo" else "learned+" + name
        raise ValueError(f"method {name!r} takes no tuner: leave it out, or use method {instead}")
    if around and issubclass(kinds[0][1], FirstOrder):
        raise ValueError(f"method {name!r}: a first-order method evaluates no directions, and nothing can be put around it")
    found: Any = None
    for part, kind in kinds:
        allowed = known[part] - {"inner"}
        own = renamed(given[part], allowed)
        if unknown := sorted(own.keys() - allowed):
            raise ValueError(f"method {part!r} has no argument {unknown[0]!r}; it has {', '.join(sorted(allowed))}")
        defaults = {"epsilon": epsilon, "horizon": steps}
        own = {field: value for field, value in defaults.items() if field in known[part]} | own
        if found is not None:
            own["inner"] = found
        if "tuner" in known[part]:
            loaded = Tuner.from_pretrained(tuner) if isinstance(tuner, str) else tuner
            assert loaded is not None, "refused above"
            own["tuner"] = loaded.matched(model, match)
        found = kind(**own)
    return found


def declared_method(name: str, args: Mapping[str, Any], model: nn.Module) -> Method[Any] | FirstOrder[Any]:
    """The method of a name with a fresh tuner where it needs one: for its declared costs on this model.

    Raises:
        ValueError: an unknown name or argument.
    """
    tuner = Tuner.for_model(model) if "learned" in name.split(AROUND) else None
    return build_method(name, 1e-3, args, tuner, model)


def method_list() -> list[dict[str, str]]:
    """A row per method and wrapper, by name: what it is, forward passes per step by default, memory, paper.

    Memory is kept between steps, in copies of the trained weights (``1P``). Rows of wrappers end with ``+…``.
    """
    kinds: dict[str, Any] = {name: method_class(name) for name in method_names()}
    kinds |= {f"{name}{AROUND}…": wrapper_class(name) for name in wrapper_names()}
    model = nn.Linear(2, 2)
    return [
        {
            "method": name,
            "what": (kind.__doc__ or "").splitlines()[0],
            "passes": f"{declared_method(name.replace('…', 'mezo'), {}, model).passes:g}",
            "memory": kind.info.memory,
            "paper": kind.info.paper,
        }
        for name, kind in kinds.items()
    ]
