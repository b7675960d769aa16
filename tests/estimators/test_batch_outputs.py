"""What closures return, and what logits and per-example losses tell beside the loss: exact on linear models."""

import pytest
import torch

from l2l.estimators import (
    BatchOutputs,
    DirectionalStatistics,
    MicroBatched,
    as_loss,
    directional_statistics,
    loss_of,
    pieces_of,
    subspace_newton,
)

B, K, D, N = 5, 3, 7, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(B, D, generator=GENERATOR, dtype=torch.float64)
W = torch.randn(D, K, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 2, 1, 1, 0])
U = torch.randn(N, D, K, generator=GENERATOR, dtype=torch.float64)
EPSILON = 1e-5


def logits(w: torch.Tensor) -> torch.Tensor:
    return X @ w


def outputs(w: torch.Tensor, form: str) -> BatchOutputs:
    if form == "logits":
        return BatchOutputs.of((logits(w), Y))
    return BatchOutputs.of(torch.nn.functional.cross_entropy(logits(w), Y, reduction="none"))


def example_gradients() -> torch.Tensor:
    """[B, D, K] by autograd."""
    per_example = torch.func.vmap(
        torch.func.grad(lambda w, x, y: torch.nn.functional.cross_entropy(x @ w, y)), in_dims=(None, 0, 0)
    )
    return per_example(W, X, Y)


@pytest.mark.parametrize("form", ["logits", "losses"])
def test_the_loss_is_the_mean_over_examples_in_float32_and_wider(form: str):
    plain = torch.nn.functional.cross_entropy(logits(W), Y)
    assert outputs(W, form).loss == pytest.approx(plain.item(), rel=1e-12)
    value = (logits(W).bfloat16(), Y) if form == "logits" else torch.ones(4, dtype=torch.bfloat16)
    loss = loss_of(value)
    assert isinstance(loss, torch.Tensor)
    assert loss.dtype == torch.float32


def test_a_scalar_is_its_own_loss_and_one_example():
    assert as_loss(loss_of(torch.tensor(2.5))) == BatchOutputs.of(2.5).loss == 2.5
    assert BatchOutputs.of(torch.tensor(2.5)).losses.shape == (1,)


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), (torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))])
def test_a_loss_that_is_not_finite_is_never_masked(value):
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        BatchOutputs.of(value)


@pytest.mark.parametrize("form", ["logits", "losses"])
@pytest.mark.parametrize("central", [True, False])
def test_derivatives_per_example_are_those_of_backpropagation(form: str, central: bool):
    plus = [outputs(W + EPSILON * u, form) for u in U]
    minus = [outputs(W - EPSILON * u, form) for u in U] if central else None
    found = directional_statistics(outputs(W, form), plus, minus, EPSILON)
    gradients = example_gradients()
    wanted = torch.einsum("bdk,ndk->bn", gradients, U)
    # Of linear logits the one-sided change is exact; the loss itself is curved, by epsilon / 2 u^T H u.
    torch.testing.assert_close(found.derivatives, wanted, rtol=0, atol=2e-4 if form == "losses" and not central else 1e-8)
    assert found.signal is not None
    pairs = [(gradients[i] * u).sum() * (gradients[j] * u).sum() for u in U for i in range(B) for j in range(B) if i != j]
    assert found.signal == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-3)
    torch.testing.assert_close(found.mean, wanted.mean(0), rtol=0, atol=2e-4)
    assert found.noise == pytest.approx(wanted.var(0).mean().item(), rel=1e-3)


@pytest.mark.parametrize("central", [True, False])
def test_the_curvature_from_logits_is_the_hessian_of_a_linear_model_between_the_directions(central: bool):
    plus = [outputs(W + EPSILON * u, "logits") for u in U]
    minus = [outputs(W - EPSILON * u, "logits") for u in U] if central else None
    found = directional_statistics(outputs(W, "logits"), plus, minus, EPSILON)
    along = torch.func.hessian(lambda a: torch.nn.functional.cross_entropy(logits(W + torch.einsum("n,ndk->dk", a, U)), Y))
    torch.testing.assert_close(found.curvature, along(torch.zeros(N, dtype=torch.float64)), rtol=1e-6, atol=1e-8)
    assert found.curvature_along == pytest.approx(found.curvature.diag().mean().item())


def test_the_curvature_from_losses_is_the_empirical_fisher_matrix():
    plus, minus = ([outputs(W + s * EPSILON * u, "losses") for u in U] for s in (1, -1))
    found = directional_statistics(plus[0], plus, minus, EPSILON)
    c = torch.einsum("bdk,ndk->bn", example_gradients(), U)
    torch.testing.assert_close(found.curvature, c.T @ c / B, rtol=1e-6, atol=1e-8)


def test_options_that_are_not_there_change_nothing():
    pad = torch.full((B, 2), -torch.inf, dtype=torch.float64)

    def padded(w: torch.Tensor) -> BatchOutputs:
        return BatchOutputs.of((torch.cat([logits(w), pad], 1), Y))

    def of(read) -> DirectionalStatistics:
        return directional_statistics(read(W), [read(W + EPSILON * u) for u in U], None, EPSILON)

    own, wide = of(lambda w: outputs(w, "logits")), of(padded)
    torch.testing.assert_close(own.derivatives, wide.derivatives, rtol=0, atol=1e-12)
    torch.testing.assert_close(own.curvature, wide.curvature, rtol=0, atol=1e-12)


def test_outputs_of_two_batches_are_refused():
    with pytest.raises(TypeError, match="all evaluations of a step are of one batch"):
        directional_statistics(outputs(W, "logits"), [BatchOutputs.of((logits(W)[:3], Y[:3]))], None, EPSILON)


def test_pieces_of_a_batch_join_their_outputs_and_weigh_their_losses():
    wide = torch.cat([logits(W), torch.full((B, 1), -torch.inf, dtype=torch.float64)], 1)
    pieces = (lambda: (logits(W)[:2], Y[:2])), (lambda: (wide[2:], Y[2:]))
    whole = MicroBatched(pieces, (2 / B, 3 / B))
    found = BatchOutputs.of(whole())
    assert found.logits is not None
    assert found.logits.shape == (B, K + 1)
    assert found.loss == pytest.approx(outputs(W, "logits").loss, rel=1e-12)
    assert sum(float(piece()) for piece in pieces_of(whole)) == pytest.approx(found.loss, rel=1e-12)


def test_the_curvature_of_a_step_sends_the_mean_of_the_directions_to_the_minimum_along_it():
    m, c = torch.diag(torch.tensor([2.0, 8.0])), torch.tensor([1.0, 3.0])
    seen = statistics(m, c)
    kappa = seen.curvature_of_step
    step = c.double() / (2 * kappa)
    assert (step @ m.double() @ step).item() == pytest.approx((c.double() @ step).item())  # the minimum of c a - a M a / 2
    assert statistics(m[:1, :1], c[:1]).curvature_of_step == pytest.approx(2.0)
    assert statistics(m, torch.zeros(2)).curvature_of_step == pytest.approx(2.5)


def statistics(curvature: torch.Tensor, mean: torch.Tensor, b: int = 4) -> DirectionalStatistics:
    return DirectionalStatistics(mean.expand(b, -1).double(), curvature.double())


def test_without_damping_and_noise_the_step_is_newtons():
    m = torch.randn(N, N, generator=GENERATOR, dtype=torch.float64)
    m, c = m @ m.T + torch.eye(N), torch.arange(1.0, N + 1)
    a = subspace_newton(statistics(m, c), None, damping=0.0, gain=1.0, trust=float("inf"))
    torch.testing.assert_close(m @ a, c.double())


def test_with_noise_alone_the_step_is_the_mean_of_the_posterior():
    # c ~ N(M x, M / b) with x ~ N(0, (M^-1 g)...): in the eigenbasis a_i = c_i / (m_i + m_i^2 / (b G)).
    m, c, b, signal = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, -1.0, 2.0]), 4, 0.3
    a = subspace_newton(statistics(m.diag(), c, b), signal, damping=0.0, gain=1.0, trust=float("inf"))
    torch.testing.assert_close(a, (c / (m + m**2 / (b * signal))).double())


def test_the_trust_region_bounds_the_change_of_the_model():
    m, c = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([3.0, -5.0])
    free = subspace_newton(statistics(m, c), None, 0.1, 1.0, float("inf"))
    bound = subspace_newton(statistics(m, c), None, 0.1, 1.0, 0.02)
    assert (bound @ m.double() @ bound / 2).item() == pytest.approx(0.02)
    torch.testing.assert_close(bound / bound.norm(), free / free.norm())


def test_flat_directions_give_no_step_and_overflow_is_told():
    assert subspace_newton(statistics(torch.zeros(2, 2), torch.zeros(2)), None, 0.5, 1.0, 0.02).tolist() == [0.0, 0.0]
    with pytest.raises(FloatingPointError, match="not finite"):
        subspace_newton(statistics(torch.full((2, 2), torch.inf), torch.zeros(2)), None, 0.5, 1.0, 0.02)
