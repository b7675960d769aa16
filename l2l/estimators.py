"""Gradient estimates: differences of losses, forward-mode derivatives, and backward passes that store no gradients.

- What a closure returns, and the loss it means (:class:`BatchOutputs`): a scalar, a loss per example, or logits and targets.
  A loss that is not finite raises FloatingPointError, a value that means none TypeError: see :func:`finite_loss`.
- Projected gradients from losses: two-sided (SPSA; exact on quadratics) and one-sided.
- What per-example losses and logits tell beside the loss, at no further pass (:func:`directional_statistics`): derivatives per
  example, the squared norm of the gradient without the noise of the batch, and a curvature that is never negative.
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

ClosureValue: TypeAlias = torch.Tensor | float | tuple[torch.Tensor, torch.Tensor]
"""What a closure may return: the loss, as a scalar tensor or a float; losses per example [b], whose mean is the loss; or
(logits [m, K], targets [m]), whose cross entropy is the loss. An option that is not there has a logit of minus infinity."""
Closure: TypeAlias = Callable[[], ClosureValue]
"""Computes the loss at the present parameters, or what it is the mean of."""


class BadLoss(FloatingPointError):
    """A loss, or a gradient, that no update can be made by."""

    def __init__(self, message: str, loss: float = float("nan"), exploded: bool = False, passes: int = 0) -> None:
        super().__init__(message)
        self.loss = loss
        """The loss, where it is known."""
        self.exploded = exploded
        """Whether it is finite."""
        self.passes = passes
        """Evaluations that its step had made."""
        self.evaluations: tuple[float, ...] = ()
        self.readings: tuple[tuple[float, ...], ...] = ()
        """What these gave, as of :class:`l2l.optim.StepReport`."""


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
        TypeError: the closure gave nothing that means a loss: see :data:`ClosureValue`.
        FloatingPointError: the loss is not finite; nothing is masked.
    """
    with torch.no_grad():
        return as_loss(loss_of(closure()))


def loss_of(value: ClosureValue) -> torch.Tensor | float:
    """The loss that a closure's value means: its mean, in float32 or wider. A scalar is returned as it is.

    Raises:
        TypeError: it means none.
    """
    if isinstance(value, tuple):
        logits, targets = _checked_logits(value)
        return torch.nn.functional.cross_entropy(logits, targets)
    if isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) > 1:
        return _wide(value).mean()
    return value


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _checked_logits(value: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, at least float32; targets) of a closure that returned a tuple; TypeError where it is no such pair."""
    tensors = [part for part in value if isinstance(part, torch.Tensor)]
    if len(value) == len(tensors) == 2:
        logits, targets = tensors
        whole = not targets.is_floating_point() and targets.ndim == 1
        if logits.is_floating_point() and logits.ndim == 2 and whole and len(logits) == len(targets) > 0:
            return _wide(logits), targets
    shapes = [f"{tuple(v.shape)} of {v.dtype}" if isinstance(v, torch.Tensor) else type(v).__name__ for v in value]
    raise TypeError(
        f"the closure returned a tuple of {', '.join(shapes)}; a tuple is (logits [m, K], targets [m] of whole numbers)"
    )


def as_loss(value: torch.Tensor | float) -> float:
    """A scalar tensor or number as a finite float; errors as of :func:`finite_loss`."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TypeError(
                f"the closure returned a tensor of shape {tuple(value.shape)}; return a scalar loss, losses per example [b], "
                "or (logits [m, K], targets [m])"
            )
        value = value.detach().double().item()
    if not isinstance(value, int | float):
        raise TypeError(f"the closure returned {type(value).__name__}; return a scalar tensor or a float")
    if value != value or value in (float("inf"), float("-inf")):
        raise BadLoss(f"the loss is {value}: lower lr or epsilon, or look for empty or overflowing inputs", float(value))
    return float(value)


@dataclass(frozen=True)
class BatchOutputs:
    """What a closure told of a batch of b examples beside its mean loss."""

    losses: torch.Tensor
    """[b] loss of each example, at least float32; [1] where the closure returned a scalar."""
    logits: torch.Tensor | None = None
    """[b, K], at least float32, where the closure returned logits."""
    targets: torch.Tensor | None = None
    """[b] index of the right one."""

    @staticmethod
    def of(value: ClosureValue) -> "BatchOutputs":
        """The outputs of a closure's value; errors as of :func:`finite_loss`."""
        as_loss(loss_of(value))
        if isinstance(value, tuple):
            logits, targets = _checked_logits(value)
            return BatchOutputs(torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits, targets)
        losses = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        return BatchOutputs(_wide(losses).reshape(-1))

    @property
    def loss(self) -> float:
        """The mean loss."""
        if self.logits is None or self.targets is None:
            return self.losses.mean().double().item()
        return torch.nn.functional.cross_entropy(self.logits, self.targets).double().item()


def read_outputs(closure: Closure) -> BatchOutputs:
    """What the closure tells of its batch, with gradients off. Errors as of :func:`finite_loss`."""
    with torch.no_grad():
        return BatchOutputs.of(closure())


@dataclass(frozen=True)
class DirectionalStatistics:
    """What the outputs at theta and along N directions tell of a batch of b examples. All float64."""

    derivatives: torch.Tensor
    """[b, N] derivative of each example's loss along each direction, c_ik."""
    curvature: torch.Tensor
    """[N, N] positive semidefinite curvature of the mean loss between the directions, M."""

    @property
    def mean(self) -> torch.Tensor:
        """[N] derivative of the mean loss: the projected gradients."""
        return self.derivatives.mean(0)

    @property
    def signal(self) -> float | None:
        """G: squared norm of the expected gradient per unit of squared length of a direction, unbiased, so that it may be
        negative: mean over directions, and over pairs of unlike examples, of c_i c_j. None where there is one example alone."""
        b = len(self.derivatives)
        if b == 1:
            return None
        return ((self.derivatives.sum(0) ** 2 - (self.derivatives**2).sum(0)) / (b * (b - 1))).mean().item()

    @property
    def noise(self) -> float | None:
        """Variance of one example's derivative along a direction, mean over directions. None where there is one example."""
        return self.derivatives.var(0).mean().item() if len(self.derivatives) > 1 else None

    @property
    def curvature_along(self) -> float:
        """u^T G u, mean over the directions: the mean of the diagonal of M."""
        return self.curvature.diag().mean().item()

    @property
    def curvature_of_step(self) -> float:
        """kappa for which the step -(1 / kappa) mean_k c_k u_k ends at the minimum of the parabola along it:
        c^T M c / (N c^T c). Of one direction it is u^T G u; of N whose curvatures do not mix, the N-th part, since their mean
        goes the N-th part of the way along each."""
        c, m = self.mean, self.curvature
        squared = (c @ c).item()
        return (c @ m @ c).item() / (len(c) * squared) if squared else self.curvature_along / len(c)


def directional_statistics(
    at: BatchOutputs, plus: Sequence[BatchOutputs], minus: Sequence[BatchOutputs] | None, distance: float
) -> DirectionalStatistics:
    """Derivatives and curvature along N directions from outputs, by differences over ``distance``.

    Of logits z [b, K], with p = softmax(z), y one-hot and J_k the change of z along direction k: c_ik = (p_i - y_i)^T J_ik, and
    M_kl = mean_i J_ik^T (diag(p_i) - p_i p_i^T) J_il, the Gauss-Newton matrix, which for cross entropy is the Fisher matrix
    (Martens 2020, arXiv:1412.1193). Of per-example losses: c_ik their difference and M_kl = mean_i c_ik c_il, the empirical
    Fisher matrix; of a scalar that is the square of its derivative. Central differences leave p at the mean of both sides.

    Args:
        at: outputs at theta, for one-sided differences; not read for central ones.
        plus: outputs at theta + distance * u_k.
        minus: outputs at theta - distance * u_k; None: one-sided differences.

    Raises:
        TypeError: the number of examples or logits differs between evaluations.
    """
    first = plus[0]
    sides = [at] * len(plus) if minus is None else list(minus)
    length = distance if minus is None else 2 * distance
    if any(_shape(one) != _shape(first) for one in (*plus, *sides)):
        raise TypeError("the closure returned outputs of another shape than before: all evaluations of a step are of one batch")
    if first.logits is None or first.targets is None:
        there, here = (torch.stack([own.losses for own in some], 1).double() for some in (plus, sides))
        derivatives = (there - here) / length
        return DirectionalStatistics(derivatives, derivatives.T @ derivatives / len(derivatives))
    there, here = (torch.stack([own.logits for own in some if own.logits is not None], -1).double() for some in (plus, sides))
    change = ((there - here) / length).masked_fill(torch.isneginf(there) & torch.isneginf(here), 0.0)  # [b, K, N]
    middle = here[..., 0] if minus is None else ((there + here) / 2).mean(-1)
    p = middle.softmax(1)
    of_target = change.gather(1, first.targets[:, None, None].expand(-1, 1, len(plus)))[:, 0]
    expected = torch.einsum("bk,bkn->bn", p, change)
    centred = change - expected[:, None]
    curvature = torch.einsum("bk,bkn,bkm->nm", p, centred, centred) / len(p)
    if minus is None:
        derivatives = expected - of_target
    else:  # exact in the loss, as two_point
        derivatives = torch.stack([(a.losses - b.losses).double() for a, b in zip(plus, sides, strict=True)], 1) / length
    return DirectionalStatistics(derivatives, curvature)


def balanced(statistics: DirectionalStatistics, first: int) -> tuple[DirectionalStatistics, torch.Tensor]:
    """Statistics along directions of two kinds with the same mean curvature in both, and [N] the factors that make it so.

    Directions of few blocks change the outputs less than those of all: damping by the mean of the diagonal would leave them no
    step. Along a direction that is s times as long, derivatives are s times as large and curvature s^2.

    Args:
        first: the number of directions of the first kind, whose factor is 1.
    """
    diagonal = statistics.curvature.diag()
    mean, other = diagonal[:first].mean(), diagonal[first:].mean()
    factors = torch.ones_like(diagonal)
    if mean > 0 and other > 0:
        factors[first:] = (mean / other).sqrt()
    scaled = DirectionalStatistics(statistics.derivatives * factors, statistics.curvature * factors * factors[:, None])
    return scaled, factors


def _shape(outputs: BatchOutputs) -> tuple[int, ...]:
    return tuple(outputs.losses.shape if outputs.logits is None else outputs.logits.shape)


def subspace_newton(
    statistics: DirectionalStatistics, signal: float | None, damping: float, gain: float, trust: float
) -> torch.Tensor:
    """[N] lengths a of the step -sum_k a_k u_k: a damped Gauss-Newton step within the span of N directions.

    a = gain (M + M^2 / (b G) + damping tr(M) / N I)^-1 c. The second term is the noise M / b of c, against a gradient of which
    no direction is known to be larger than another, of squared length G per direction: with it alone, a is the mean of the
    posterior. The step is then shortened so that the model's change a^T M a / 2 is at most ``trust``.
    Subspace: Cartis, Fowkes, Shao 2022, arXiv:2211.09873.

    Args:
        statistics: of b examples.
        signal: G, positive; None: the noise is unknown, and its term left out.
        damping, gain, trust: pure numbers.

    Raises:
        FloatingPointError: derivatives or curvature are not finite.
    """
    m, c = statistics.curvature, statistics.mean
    if not (m.isfinite().all() and c.isfinite().all()):
        raise FloatingPointError(
            "derivatives along the directions are not finite: raise epsilon, or look for overflowing logits"
        )
    scale = statistics.curvature_along
    if scale == 0:
        return torch.zeros_like(c)
    noise = 0 if signal is None else m @ m / (len(statistics.derivatives) * signal)
    a = gain * torch.linalg.solve(m + noise + damping * scale * torch.eye(len(c), dtype=m.dtype, device=m.device), c)
    change = (a @ m @ a / 2).item()
    return a if change <= trust else a * (trust / change) ** 0.5


@final
@dataclass(frozen=True)
class MicroBatched:
    """A closure made of pieces of a batch: the sum of their losses, or all their outputs, one after the other.

    Where gradients are off, as in forward passes only, each piece's activations are freed before the next begins.
    A backward pass goes back through :func:`pieces_of` one by one; one through the sum keeps them all.
    """

    pieces: tuple[Closure, ...]
    weights: tuple[float, ...] | None = None
    """Share of each piece in the loss; None: the pieces' losses are weighted already, and none returns logits."""
    whole: Closure | None = None
    """Evaluates all pieces in its own way; None: one after the other."""

    def __call__(self) -> ClosureValue:
        if self.whole is not None:
            return self.whole()
        shares = self.weights or (1.0,) * len(self.pieces)
        first, *rest = (_weighed(piece(), share) for piece, share in zip(self.pieces, shares, strict=True))
        for value in rest:
            first = _joined(first, value)
        return first


def _weighed(value: ClosureValue, share: float) -> ClosureValue:
    return value if share == 1 or isinstance(value, tuple) else share * value


def _joined(a: ClosureValue, b: ClosureValue) -> ClosureValue:
    """Losses added; logits put one after the other, with options that are not there where a piece has fewer."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        width = max(a[0].shape[1], b[0].shape[1])
        logits = [torch.nn.functional.pad(z, (0, width - z.shape[1]), value=-torch.inf) for z in (a[0], b[0])]
        return torch.cat(logits), torch.cat([a[1], b[1]])
    assert not isinstance(a, tuple) and not isinstance(b, tuple), "pieces of a batch return values of one kind"
    return a + b


def pieces_of(closure: Closure) -> tuple[Closure, ...]:
    """What adds up to the closure's loss: the closure itself where it is not micro-batched."""
    if not isinstance(closure, MicroBatched):
        return (closure,)
    if closure.weights is None:
        return closure.pieces
    pairs = zip(closure.pieces, closure.weights, strict=True)
    return tuple(partial(lambda piece, share: share * loss_of(piece()), *pair) for pair in pairs)


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
        theta.unperturb()
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
        loss = loss_of(closure())
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
            value = loss_of(closure())
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
            value = loss_of(closure())  # with gradients on, no code switches to inference mode; no graph is built of duals
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
