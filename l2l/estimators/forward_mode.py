"""The exact derivative along one direction, by forward-mode automatic differentiation: no epsilon, and no graph.

While the closure runs, whatever function reads a parameter is given a dual number of it, with u_b as its tangent. The tangent
is made when it is read and lives as long as something computes with it, so nothing of the model's size is held."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from l2l.estimators.finite_difference import Closure, Estimate, as_loss
from l2l.params import Direction, PerturbedParameters, dense_direction
from l2l.params.blocks import Blocks
from l2l.params.functional import PASSIVE, flat, mapped, renormalises


def forward_gradient(closure: Closure, theta: PerturbedParameters, direction: Direction) -> Estimate:
    """g = <grad L, u> at theta, to rounding. One evaluation that costs about two: every activation has a tangent.

    Attention runs by the plain kernel, as the fused ones have no forward-mode rule. Tangents have the dtype of the weights.
    Baydin et al. 2022, arXiv:2202.08587, Algorithm 1. Theta is left unperturbed. All losses of the estimate are that at theta.

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
