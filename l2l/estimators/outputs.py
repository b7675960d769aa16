"""The outputs of a model that enter its loss, and the loss's gradient with respect to them, from the closure alone.

A closure shows only its value. Watched while it runs, all that it does after the last function that reads a parameter
is a function of tensors that were there before: the outputs. It is done once more with gradients on, from them: a
backward pass through the loss alone, with the memory of that, whatever the model is.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

from l2l.estimators.finite_difference import Closure
from l2l.params.functional import mapped

_DETACHING = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # pyright: ignore[reportAttributeAccessIssue]
"""Cut gradients, and change no value: done again, they are left out."""


@final
class Outputs(TorchFunctionMode):
    """Watches one evaluation. What it holds of it is what :attr:`tensors` and :meth:`gradients` need."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, dict[str, Any], Any]] = []  # function, arguments, result
        self._made_of_parameters: dict[int, weakref.ref[torch.Tensor]] = {}
        self._versions: dict[int, int] = {}
        self._loss: torch.Tensor = torch.zeros(())

    def during(self, closure: Closure) -> torch.Tensor | float:
        """The closure's value, watched."""
        with self:
            value = closure()
        self._loss = value if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float64)
        self._made_of_parameters.clear()
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        versions = {id(tensor): _version(tensor) for tensor in given}
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        of_parameters = [self._is_of_parameters(tensor) for tensor in given]
        if given and all(of_parameters):
            self._made_of_parameters |= {id(tensor): weakref.ref(tensor) for tensor in made}
        elif any(of_parameters) and made:
            self._calls, self._versions = [], {}
        elif given and (made or func is torch.Tensor.__setitem__):
            self._calls.append((func, args, kwargs, result))
            self._versions = versions | self._versions
        return result

    def _is_of_parameters(self, tensor: torch.Tensor) -> bool:
        known = self._made_of_parameters.get(id(tensor))
        return isinstance(tensor, torch.nn.Parameter) or (known is not None and known() is tensor)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The outputs, in the order in which the loss reads them. The loss itself where it cannot be told apart."""
        made: set[int] = set()
        found: dict[int, torch.Tensor] = {}
        for _, args, kwargs, result in self._calls:
            for tensor in _tensors((args, kwargs)):
                if tensor.is_floating_point() and id(tensor) not in made:
                    found[id(tensor)] = tensor
            made |= {id(tensor) for tensor in _tensors(result)}
        return list(found.values()) if id(self._loss) in made else [self._loss]

    def gradients(self) -> list[torch.Tensor]:
        """Gradient of the loss with respect to each of :attr:`tensors`.

        Raises:
            RuntimeError: what the loss reads was changed in place while it was computed.
        """
        outputs = self.tensors
        if any(self._versions.get(id(tensor), -1) != _version(tensor) for tensor in outputs if tensor is not self._loss):
            raise RuntimeError("the loss changes the model's outputs in place: copy them before, so that they can be read")
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [tensor.clone().requires_grad_() for tensor in outputs]
            known = {id(tensor): leaf for tensor, leaf in zip(outputs, leaves, strict=True)}
            if id(self._loss) in known:
                return [torch.ones_like(self._loss)]
            for function, args, kwargs, result in self._calls:
                inference = {id(t): t for t in _tensors((args, kwargs)) if t.is_inference() and id(t) not in known}
                copies = {key: tensor.clone() for key, tensor in inference.items()} | known
                args, kwargs = mapped(args, copies), mapped(kwargs, copies)
                again = args[0] if function in _DETACHING else function(*args, **kwargs)
                known |= {id(old): new for old, new in zip(_tensors(result), _tensors(again), strict=True)}
            found = torch.autograd.grad(known[id(self._loss)], leaves, allow_unused=True)
        return [torch.zeros_like(out) if own is None else own for out, own in zip(outputs, found, strict=True)]


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
