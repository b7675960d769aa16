"""The last layer at the places that are read.

Of what the last layer gives, a loss reads a few places of a batch. Its keys and values are needed at all tokens before these;
its queries, the output of its attention and everything after it at the places alone. Where only the top layers of a model are
computed, that is a good part of a pass. Which modules these are is found by running the layer, never by names: each is tried
with not-a-number wherever nothing is read, which reaches the places if anything does, whatever the weights are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

_IDS = 8
"""Tokens of a row on which a layer is tried."""
_PLACES = (torch.tensor([0, 1]), torch.tensor([_IDS - 1, _IDS // 2]))
"""Rows and columns that are read there: at the end of a row, and with tokens after it."""
_UNKNOWN = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What a module may raise at arguments that it does not know."""


@contextmanager
def replaced_forwards(
    modules: Sequence[torch.nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While it is active, the n-th module computes ``make(n, its own forward)``."""
    own = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = make(index, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward


@contextmanager
def computed_at(model: torch.nn.Module, names: Sequence[str], rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """While it is active, the modules of these names are computed at P places alone, and give 0 elsewhere. Inside another one
    of the same model, for a pass over other rows in the middle of a pass, the places are those of the inner one.

    Args:
        names: of modules that pass :func:`modules_at_places`; none: everything is computed everywhere.
        rows, positions: [P] rows and columns of the places.
    """
    outer = _present.get()
    inside = outer is not None and outer[0] is model
    modules = [] if inside else [model.get_submodule(name) for name in names]
    before = _present.set((model, (rows, positions) if names else None))
    try:
        with replaced_forwards(modules, lambda _, forward: partial(_at_present_places, forward)):
            yield
    finally:
        _present.reset(before)


_present: ContextVar[tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor] | None] | None]
_present = ContextVar("_present", default=None)
"""The model of the innermost :func:`computed_at`, and its places; None for these where it has no names."""


def _at_present_places(forward: Callable[..., Any], states: torch.Tensor) -> torch.Tensor:
    present = _present.get()
    places = None if present is None else present[1]
    return forward(states) if places is None else _at_places(forward, *places, 0.0, states)


def _at_places(
    forward: Callable[..., Any], rows: torch.Tensor, positions: torch.Tensor, elsewhere: float, states: torch.Tensor
) -> torch.Tensor:
    """[R, T, M] ``forward`` of states [R, T, D] at the places; whole where these are more than half of all."""
    count, columns = states.shape[:2]
    if 2 * len(rows) > count * columns:
        return forward(states)
    found = forward(states[rows, positions][None])[0]
    return found.new_full((count, columns, found.shape[-1]), elsewhere).index_put((rows, positions), found)


@final
class _Reached(Exception):
    """A pass has come to the layer, with the arguments of its call; no error."""


@torch.no_grad()
def modules_at_places(model: torch.nn.Module, layer: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules with a matrix, none inside another, that may be computed at the places alone; none where that cannot
    be told, as for a model that is partly on the meta device.

    Args:
        model: a causal language model, possibly with adapters.
        layer: its last one.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return ()
    training = [module for module in model.modules() if module.training]
    model.eval()  # without dropout
    try:
        with _NoNumberForNone():
            modules = _modules_at_places(model, layer)
    except _UNKNOWN:
        return ()
    finally:
        for module in training:
            module.training = True
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(module)] for module in modules)


@final
class _NoNumberForNone(TorchFunctionMode):
    """Attention gives not-a-number for a query that is none. Fused kernels of some processors give 0, as for a row that sees
    nothing. The choice of a kernel is one for all threads, so that it is not made here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            query: torch.Tensor = args[0] if args else kwargs["query"]
            return found.masked_fill(query.isnan().any(-1, keepdim=True), torch.nan)
        return found


def _modules_at_places(model: torch.nn.Module, layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules, of a model without dropout."""
    args, kwargs = _call_of(model, layer)
    expected = _read(layer(*args, **kwargs))

    def unchanged(*modules: torch.nn.Module) -> bool:
        calls: list[bool] = []
        with replaced_forwards(modules, lambda _, forward: partial(_tried, forward, calls)):
            try:
                found = _read(layer(*args, **kwargs))
            except _UNKNOWN:
                return False
        if calls != [True] * len(modules):
            return False
        tolerance = torch.finfo(found.dtype).eps ** 0.5 * expected.float().std()
        return bool((found.float() - expected.float()).abs().max() <= tolerance)  # False for not-a-number

    modules = list(_outermost(layer, unchanged))
    return modules if modules and unchanged(*modules) else []


def _call_of(model: Any, layer: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the layer in a pass over two rows of random ids; RuntimeError where it is not called."""
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, embedding.num_embeddings, (2, _IDS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)

    def stop(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    with layer.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _Reached as reached:
            return reached.args[0], reached.args[1]
    raise RuntimeError("the last layer is not called")


def _read(output: Any) -> torch.Tensor:
    """[2, D] what a layer gives at the places."""
    states = output[0] if isinstance(output, tuple) else output
    rows, positions = (index.to(states.device) for index in _PLACES)
    found: torch.Tensor = states[rows, positions]
    return found


def _outermost(module: torch.nn.Module, fits: Callable[[torch.nn.Module], bool]) -> Iterator[torch.nn.Module]:
    """Modules with a matrix that fit, in the place of all that is inside them."""
    for child in module.children():
        if any(parameter.ndim > 1 for parameter in child.parameters()):
            if fits(child):
                yield child
            else:
                yield from _outermost(child, fits)


def _tried(forward: Callable[..., Any], calls: list[bool], states: torch.Tensor) -> torch.Tensor:
    """What a module gives at the places, and not-a-number elsewhere; notes whether the rest of its input stays out of that."""
    rows, positions = (index.to(states.device) for index in _PLACES)
    tainted = torch.full_like(states, torch.nan).index_put((rows, positions), states[rows, positions])
    calls.append(states.shape[:2] == (2, _IDS) and bool(forward(tainted)[rows, positions].isfinite().all()))
    return _at_places(forward, rows, positions, torch.nan, states)
