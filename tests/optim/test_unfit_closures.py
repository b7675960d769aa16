"""A closure that spoils the step it belongs to is warned of, once, with the remedy; no graph is built where none is needed.

The kind of fault (A5 of the issue): closures written for backpropagation passed in silence. Situations from public trackers, in
our words: princeton-nlp/MeZO#2 (dropout under zeroth-order steps), huggingface/peft#3382 (a closure that zeroes gradients and
goes backward), skorch-dev/skorch#207 (a trainer's closure that calls ``train()`` and ``backward()``), and MeZO's assertion that
there is no gradient accumulation.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Quadratic, TiedLM, same_bits, weights
from test_torch_contract import reset_accelerate
from torch import Tensor, nn
from torch.nn import functional

import l2l
from l2l.estimators import MicroBatched


class Dropping(nn.Module):
    """Dropout as a function, which no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self) -> Tensor:
        return functional.dropout(self.linear.weight, 0.5, self.training).square().mean()


@contextmanager
def quiet() -> Iterator[None]:
    """No warning of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=UserWarning)
        yield


def warned_once(optimizer: Any, closure: Any, message: str) -> None:
    """At the first step, at the caller's line, and never again."""
    with pytest.warns(UserWarning, match=message) as seen:
        optimizer.step(closure)
    assert len(seen) == 1 and seen[0].filename == __file__
    with quiet():
        for _ in range(3):
            optimizer.step(closure)


@pytest.mark.parametrize("model", [Dropping(), nn.TransformerEncoderLayer(8, 2, 16)], ids=["function", "modules"])
def test_dropout_in_train_mode_is_warned_of_and_the_remedy_is_quiet(model: nn.Module):
    x = torch.ones(1, 3, 8)
    loss = (lambda: model()) if isinstance(model, Dropping) else (lambda: model(x).square().mean())
    warned_once(l2l.MeZO(model.train()), loss, r"draws random numbers.*call model.eval\(\)")
    model.eval()
    with quiet():
        l2l.MeZO(model).step(loss)


def test_a_model_that_goes_back_to_train_mode_is_warned_of_then():
    model = Dropping().eval()
    optimizer = l2l.MeZO(model)
    with quiet():
        optimizer.step(model)
    model.train()
    warned_once(optimizer, model, "draws random numbers")


@pytest.mark.parametrize("pieces", [1, 3])
def test_random_numbers_that_the_closure_seeds_are_the_same_on_both_sides_and_quiet(pieces: int):
    model = Dropping().train()

    def seeded() -> Tensor:
        torch.manual_seed(0)
        return model() / pieces

    with quiet(), torch.random.fork_rng(devices=[]):
        optimizer = l2l.MeZO(model)
        for _ in range(2):
            torch.rand(5)
            optimizer.step(seeded if pieces == 1 else MicroBatched((seeded,) * pieces))
    one_piece = MicroBatched((lambda: model() / 2,) * 2)
    warned_once(l2l.MeZO(model), one_piece, "draws random numbers")


def backward(model: Any, optimizer: Any, before: Callable[[], Any]) -> Callable[[], Tensor]:
    @before()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


def test_backward_in_a_closure_is_an_error_that_names_the_remedy_and_theta_stays():
    model = TiedLM()
    optimizer, before = l2l.MeZO(model, perturb="functional"), weights(model)
    with pytest.raises(RuntimeError, match=r"the closure calls backward\(\).*automatic_optimization = False"):
        optimizer.step(backward(model, optimizer, torch.no_grad))
    assert same_bits(before, weights(model))
    with quiet():
        optimizer.step(model)


def test_backward_with_gradients_turned_on_is_warned_of_and_zero_grad_frees_them():
    model = TiedLM()
    optimizer = l2l.MeZO(model)
    warned_once(optimizer, backward(model, optimizer, torch.enable_grad), r"calls backward\(\).*optimizer.zero_grad\(\)")
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    with quiet():
        optimizer.step(model)


def test_gradients_that_were_there_before_are_no_fault_of_the_closure():
    model = TiedLM()
    model().backward()
    with quiet():
        l2l.MeZO(model).step(model)


def test_functional_perturbation_refuses_gradients_with_the_remedy():
    model = TiedLM()
    optimizer = l2l.MeZO(model, perturb="functional")
    with pytest.raises(RuntimeError, match=r"leave backward\(\) and enable_grad\(\) out of the closure"):
        optimizer.step(torch.enable_grad()(model.forward))


def test_a_graph_that_a_closure_builds_is_warned_of():
    model = TiedLM()
    warned_once(l2l.MeZO(model), torch.enable_grad()(model.forward), r"a loss with a graph.*leave enable_grad\(\) out")


@pytest.mark.parametrize("name", ["MeZO", "FZOO", "RSGN", "HiZOO", "ES", "AGZO", "SVRG"])
def test_no_evaluation_builds_a_graph(name: str):
    model, graphs = TiedLM(), []

    def closure() -> Tensor:
        loss = model()
        graphs.append(loss.requires_grad)
        return loss

    with quiet():
        optimizer = getattr(l2l, name)(model)
        for _ in range(3):
            optimizer.step(closure)
    assert graphs and not any(graphs)


def test_methods_that_differentiate_are_not_warned_of():
    model = TiedLM()
    with quiet():
        for optimizer in (l2l.ForwardGrad(model), l2l.DiZO(model, search="fo", interval=1, iterations=1)):
            for _ in range(2):
                optimizer.step(model)


def test_accelerates_accumulation_is_warned_of_and_a_single_step_is_not():
    accelerate = pytest.importorskip("accelerate", reason="accelerate comes with the extra 'gguf'")
    try:
        for steps in (1, 2):
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
            model = TiedLM()
            own = l2l.MeZO(model)
            optimizer = accelerator.prepare_optimizer(own, device_placement=False)

            def batches(optimizer: Any = optimizer, model: Any = model, accelerator: Any = accelerator) -> None:
                for _ in range(4):
                    with accelerator.accumulate(model):
                        optimizer.step(model)

            if steps == 1:
                with quiet():
                    batches()
            else:
                with pytest.warns(UserWarning, match="gradient_accumulation_steps to 1.*MicroBatched") as seen:
                    batches()
                assert len(seen) == 1
            assert own.steps_done == 4 // steps
            reset_accelerate()
    finally:
        reset_accelerate()


def lightning_run(automatic: bool) -> tuple[Any, Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = Quadratic(), automatic

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            if automatic:
                return self.model()
            self.optimizers().step(closure=self.model)  # pyright: ignore
            return None

        def configure_optimizers(self) -> Any:
            return l2l.MeZO(self, lr=1e-3)

    module = Module()
    quietly = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", **quietly)
    trainer.fit(module, torch.utils.data.DataLoader(range(3)))
    return module, trainer.optimizers[0]


def test_lightnings_automatic_optimization_is_warned_of_and_the_manual_one_steps_alike():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lightning_run(automatic=True)
        said = [str(one.message) for one in seen if "backward()" in str(one.message)]
        assert len(said) == 1 and "automatic_optimization = False" in said[0]
        module, optimizer = lightning_run(automatic=False)
        assert sum("backward()" in str(one.message) for one in seen) == 1
    assert optimizer.steps_done == 3 and all(p.grad is None for p in module.parameters())
