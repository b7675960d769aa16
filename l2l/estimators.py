"""Gradient estimates: differences of losses, forward-mode derivatives, and backward passes that store no gradients.

- Projected gradients from losses: two-sided (SPSA; exact on quadratics) and one-sided. A loss that is not finite raises
  FloatingPointError, one that is no scalar TypeError: see :func:`finite_loss`.
- A backward pass in which every gradient is handed over and freed as soon as it is complete (:func:`consume_gradients`).
- The outputs of a model that enter its loss, and the loss's gradient with respect to them, found from the closure alone
  (:class:`Outputs`): whatever follows the last function that reads a parameter is a function of tensors that were there
  before. It is repeated with gradients on, which costs a backward pass through the loss alone.
- The derivative along one direction by forward-mode automatic differentiation (:func:`forward_gradient`): exact, without
  epsilon and without a graph. Whatever function reads a parameter is given a dual number whose tangent is u_b; the tangent is
  made when it is read and freed with its last use, so nothing of the model's size is held.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, final

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters, dense_direction
from l2l.params.functional import PASSIVE, flat, mapped, renormalises

Closure: TypeAlias = Callable[[], torch.Tensor | float]
"""Computes the loss at the present parameters: a scalar tensor or a float."""


@dataclass(frozen=True)
class Estimate:
    """Losses along one direction, and the projected gradient they give."""

    direction: Direction
    loss_plus: float
    """Loss at theta + epsilon * u."""
    loss_minus: float | None
    """Loss at theta - epsilon * u; None where it was not evaluated."""
    projected_gradient: float
    """Estimate of <gradient, u>."""
    loss_center: float | None = None
    """Loss at theta; None where it was not evaluated."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The losses evaluated: at both sides, else at the one side and at theta."""
        other = self.loss_center if self.loss_minus is None else self.loss_minus
        return (self.loss_plus,) if other is None else (self.loss_plus, other)

    @property
    def loss(self) -> float:
        """Their mean."""
        return sum(self.losses) / len(self.losses)


def finite_loss(closure: Closure) -> float:
    """The closure's loss as a Python float.

    Raises:
        TypeError: the closure gave neither a scalar tensor nor a number.
        FloatingPointError: the loss is not finite; nothing is masked.
    """
    with torch.no_grad():
        return as_loss(closure())


def as_loss(value: torch.Tensor | float) -> float:
    """A scalar tensor or number as a finite float; errors as of :func:`finite_loss`."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TypeError(f"the closure returned a tensor of shape {tuple(value.shape)}; return a scalar loss")
        value = value.detach().double().item()
    if not isinstance(value, int | float):
        raise TypeError(f"the closure returned {type(value).__name__}; return a scalar tensor or a float")
    if value != value or value in (float("inf"), float("-inf")):
        raise FloatingPointError(f"the loss is {value}: lower lr or epsilon, or look for empty or overflowing inputs")
    return float(value)


@final
@dataclass(frozen=True)
class MicroBatched:
    """A closure that adds up pieces; each is weighted already, so that the sum is the loss of the whole batch.

    Where gradients are off, as in forward passes only, each piece's activations are freed before the next begins.
    A backward pass reads ``pieces`` and goes back through each by itself; one through the sum keeps them all.
    """

    pieces: tuple[Closure, ...]
    whole: Closure | None = None
    """Adds them up in its own way; None: one after the other."""

    def __call__(self) -> torch.Tensor | float:
        if self.whole is not None:
            return self.whole()
        first, *rest = self.pieces
        total = first()
        for piece in rest:
            total = total + piece()
        return total


def pieces_of(closure: Closure) -> tuple[Closure, ...]:
    """What adds up to the closure's loss: the closure itself where it is not micro-batched."""
    return closure.pieces if isinstance(closure, MicroBatched) else (closure,)


def two_point(closure: Closure, theta: PerturbedParameters, direction: Direction, epsilon: float) -> Estimate:
    """g = (L+ - L-) / (2 epsilon) from the losses at ``theta +- epsilon * u``: an estimate of <grad L, u>.

    Two forward passes. The parameters are left at ``-epsilon * u``, so that a step along the same direction costs no extra
    traversal; :meth:`PerturbedParameters.restore` or the end of the step brings it back.
    Spall 1992 (SPSA); Malladi et al. 2023, arXiv:2305.17333, Definition 1.
    """
    theta.perturb(direction, epsilon)
    plus = theta.evaluate(lambda: finite_loss(closure))
    theta.perturb(direction, -epsilon)
    minus = theta.evaluate(lambda: finite_loss(closure))
    return Estimate(direction, plus, minus, (plus - minus) / (2 * epsilon))


def center_loss(closure: Closure, theta: PerturbedParameters, direction: Direction | None = None) -> float:
    """The loss at theta. One forward pass; before :func:`two_point` it costs a traversal less than after.

    Half-precision weights are read as perturbed copies at distance 0: norms and biases then have the same float32 values
    as on either side, not rounded ones, whose loss would not lie between those of the two sides.

    Args:
        direction: along which the evaluations before and after are made, if there are any; it does not change the loss.
    """
    if theta.update is None:
        theta.restore()
    else:
        theta.perturb(direction or Direction(Key(0), (0.0,) * len(theta.blocks)), 0.0)
    return theta.evaluate(lambda: finite_loss(closure))


def loss_along(closure: Closure, theta: PerturbedParameters, direction: Direction, distance: float) -> float:
    """The loss at ``theta + distance * u``. One forward pass; theta is left there."""
    theta.perturb(direction, distance)
    return theta.evaluate(lambda: finite_loss(closure))


def one_sided(
    closure: Closure, theta: PerturbedParameters, directions: Sequence[Direction], epsilon: float, center: float | None = None
) -> tuple[Estimate, ...]:
    """g = (L+ - L0) / epsilon along each direction, with one loss at theta for all of them.

    One forward pass per direction, and one for L0 unless ``center`` has it. The parameters are left at the last of them.
    Used by FZOO (arXiv:2506.09034) and AGZO, for example.
    """
    base = center_loss(closure, theta) if center is None else center
    plus = [(direction, loss_along(closure, theta, direction, epsilon)) for direction in directions]
    return tuple(Estimate(direction, loss, None, (loss - base) / epsilon, base) for direction, loss in plus)


def consume_gradients(closure: Closure, blocks: Blocks, consume: Callable[[int, torch.Tensor], None]) -> float:
    """Loss and gradient at the present parameters; ``consume(i, gradient_i)`` is called once per block, in backward order.

    Peak memory: the activations and the gradients in flight, never a gradient per parameter. Gradients that the caller
    had stored stay as they were. A block that the loss does not reach is not reported.

    Raises:
        TypeError: the closure's value carries no graph.
        FloatingPointError: the loss is not finite.
    """
    with torch.enable_grad(), _gradients_handed_over(blocks, consume):
        loss = closure()
        value = as_loss(loss)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise TypeError("the closure returned a loss without a graph: do not detach it or call .item() in it")
        # Let autograd add up the parts of the gradient of a tensor that is used more than once without a third tensor.
        # It adds in place where it alone holds the first part. A part that is a transposed view of the matrix that the head
        # has computed holds that one too; detached, it does not. Of a tied embedding that is the largest tensor there is.
        for node in _repeated(loss):
            node.register_hook(lambda parts, _: tuple(part if part is None else part.detach() for part in parts))
        loss.backward(inputs=[block.tensor for block in blocks])  # other parameters gather no gradient
    return value


def summed_gradients(pieces: Iterable[Closure], blocks: Blocks) -> tuple[float, dict[int, torch.Tensor]]:
    """(loss, gradient by index of the block) of the sum of the pieces, one :func:`consume_gradients` each."""
    found: dict[int, torch.Tensor] = {}

    def gather(index: int, gradient: torch.Tensor) -> None:
        found[index] = found[index].add_(gradient) if index in found else gradient

    return sum(consume_gradients(piece, blocks, gather) for piece in pieces), found


def _repeated(loss: torch.Tensor) -> list[Node]:
    """Nodes of the loss's graph that hand a part of its gradient to a leaf that gets further parts."""
    givers: dict[Node, list[Node]] = {}
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for following in (other for other, _ in node.next_functions if other is not None):
            if not following.next_functions:
                givers.setdefault(following, []).append(node)
            elif following not in seen:
                seen.add(following)
                waiting.append(following)
    return [node for nodes in givers.values() if len(nodes) > 1 for node in nodes]


@contextmanager
def _gradients_handed_over(blocks: Blocks, consume: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    kept = [(block.tensor, block.tensor.requires_grad, block.tensor.grad) for block in blocks]

    def take(tensor: torch.Tensor, index: int) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            consume(index, gradient)

    handles = []
    try:
        for index, (tensor, _, _) in enumerate(kept):
            tensor.requires_grad_(True)
            tensor.grad = None
            handles.append(tensor.register_post_accumulate_grad_hook(partial(take, index=index)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, required, grad in kept:
            tensor.grad = grad
            tensor.requires_grad_(required)


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


def forward_gradient(closure: Closure, theta: PerturbedParameters, direction: Direction) -> Estimate:
    """g = <grad L, u> at theta, to rounding. One evaluation that costs about two: every activation has a tangent.

    Attention runs by the plain kernel, as the fused ones have no forward-mode rule. Tangents have the dtype of the weights.
    Baydin et al. 2022, arXiv:2202.08587, Algorithm 1. The parameters are left unperturbed; every loss is that at theta.

    Raises:
        ValueError: the closure's value carries no derivative, a weight is quantised, or an operation has no forward-mode
            rule.
        FloatingPointError: the loss or its derivative is not finite.
    """
    theta.perturb(direction, 0.0)  # unperturbed, but sparse embeddings note which rows are read
    slope, duals = None, _Duals(theta.blocks, direction)

    def differentiated() -> torch.Tensor | float:
        nonlocal slope
        with duals, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            value = closure()  # with gradients on, no code switches to inference mode; no graph is built of duals
        tangent = forward_ad.unpack_dual(value).tangent if isinstance(value, torch.Tensor) else None
        if tangent is not None and tangent.numel() == 1:
            slope = tangent.double().item()
        return value

    with forward_ad.dual_level():
        try:
            loss = as_loss(theta.evaluate(differentiated))
        except NotImplementedError as error:
            raise ValueError(f"an operation of the model has no forward-mode rule: {str(error).splitlines()[0]}") from error
    if slope is None:
        raise ValueError(
            "the closure's value carries no derivative (a float, a detached tensor, or one of no parameter): forward "
            "gradients need a differentiable loss; use objective loss, or a method that only compares losses"
        )
    if not abs(slope) < float("inf"):
        raise FloatingPointError(f"the derivative along the direction is {slope}: look for overflowing inputs")
    return Estimate(direction, loss, None, slope, loss)


class _Duals(TorchFunctionMode):
    """Replaces the parameters among a function's arguments by dual numbers."""

    def __init__(self, blocks: Blocks, direction: Direction) -> None:
        super().__init__()
        self._blocks, self._direction = blocks, direction
        self._index = {id(block.tensor): i for i, block in enumerate(blocks)}
        self._stored = [block.tensor.detach() for block in blocks]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = list(flat((*args, *kwargs.values())))
        if func in PASSIVE:
            return func(*args, **kwargs)
        found = {id(value): self._index[id(value)] for value in values if id(value) in self._index}
        for value in values:  # quantised kernels compute outside of what forward-mode rules cover
            quantised = isinstance(value, torch.nn.Parameter) and id(value) not in found
            if quantised and (not value.is_floating_point() or hasattr(type(value), "__tensor_flatten__")):
                raise ValueError(
                    f"a weight of shape {tuple(value.shape)} is quantised, and its kernels drop derivatives: forward "
                    "gradients need a model loaded without quantize; or take a method that only compares losses"
                )
        if not found:
            return func(*args, **kwargs)
        if func is torch.nn.functional.embedding and len(args) > 1 and id(args[1]) in found and not renormalises(args, kwargs):
            with torch.no_grad():  # rows of the stored weights, read as in any evaluation; the same rows of u as tangent
                rows = torch.nn.functional.embedding(*args, **kwargs)
                return forward_ad.make_dual(rows, torch.nn.functional.embedding(args[0], self._tangent(found[id(args[1])])))
        duals = {key: forward_ad.make_dual(self._stored[index], self._tangent(index)) for key, index in found.items()}
        return func(*mapped(args, duals), **mapped(kwargs, duals))

    def _tangent(self, index: int) -> torch.Tensor:
        return dense_direction(self._direction, self._blocks, index).to(self._stored[index].dtype)
