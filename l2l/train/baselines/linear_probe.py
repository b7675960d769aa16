"""Linear probing: logistic regression on the hidden state where the prompt ends.

Alain and Bengio 2016, arXiv:1610.01644; the baseline of Malladi et al. 2023, arXiv:2305.17333. The model is frozen and
its head is not used: options are classes, and what their words mean plays no part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from l2l.methods.base import check_positive
from l2l.models.load import context_length, kind_of
from l2l.tasks.base import Row, Task
from l2l.tasks.encode import encoder_for, pad_rows
from l2l.tasks.evaluate import Scores
from l2l.train.baselines import Baseline, BaselineScores, grouping_of
from l2l.train.inputs import RunInputs

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
AT_ONCE = 32
"""Prompts fed together."""


@dataclass(frozen=True)
class Features:
    """Hidden states [N, D] in float64, and the class of each row [N]."""

    states: torch.Tensor
    classes: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """Logits are ``((x - mean) / spread) @ weight + bias``."""

    mean: torch.Tensor
    spread: torch.Tensor
    weight: torch.Tensor
    """[D, classes]"""
    bias: torch.Tensor

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[N, D] to [N, classes]."""
        return ((states - self.mean) / self.spread) @ self.weight + self.bias


@final
@dataclass(frozen=True)
class LinearProbe(Baseline):
    """Logistic regression on the last hidden state at the prompt's last token; its strength is chosen on dev."""

    strengths: Sequence[float] = STRENGTHS
    """Weights of the penalty 0.5 * |weight|^2 to try, beside the mean cross entropy in nats. Features are standardised."""

    def __post_init__(self) -> None:
        if not self.strengths:
            raise ValueError("strengths is empty; give at least one")
        for strength in self.strengths:
            check_positive(strengths=strength)

    def measure(self, inputs: RunInputs) -> BaselineScores:
        splits, size = inputs.splits, inputs.reported
        options = fixed_options(inputs.task, [*splits.train, *splits.dev, *splits.test])
        initial = inputs.score(inputs.reported_train, grouping_of(inputs))
        train, dev, test = (features(inputs, rows) for rows in (splits.train, splits.dev, splits.test))
        probes = {strength: fit(train, len(options), strength) for strength in self.strengths}
        best = min(probes, key=lambda strength: _scores(probes[strength], dev).loss)
        reported = Features(train.states[:size], train.classes[:size])
        on_train, on_dev, on_test = (_scores(probes[best], part) for part in (reported, dev, test))
        weights = probes[best].weight.numel() + probes[best].bias.numel()
        details = {"strength": best, "features": train.states.shape[1], "classes": len(options)}
        passes = -(-len(splits.train) // inputs.config.batch_size)
        at_an_end = len(self.strengths) > 1 and best in (min(self.strengths), max(self.strengths))
        # A better strength may lie beyond the range.
        note = f"the strength chosen on dev, {best:g}, is the end of what was tried" if at_an_end else ""
        return BaselineScores(initial, on_train, on_dev, on_test, passes, weights, note, details)


def fixed_options(task: Task, rows: Sequence[Row]) -> tuple[str, ...]:
    """The options, which are the classes.

    Raises:
        ValueError: they are not the same for every row.
    """
    found = {task.example(row).options for row in rows}
    if task.metric != "accuracy" or len(found) != 1:
        own = "differ" if task.metric == "accuracy" else "are none: it generates answers"
        raise ValueError(
            f"linear_probe needs the same options for every row, and those of task {task.name!r} {own}; use zero_shot or icl"
        )
    return found.pop()


@torch.inference_mode()
def features(inputs: RunInputs, rows: Sequence[Row]) -> Features:
    """Hidden states of the last layer at the last token of each row's prompt, on the CPU.

    Raises:
        ValueError: the model does not read a prompt from left to right, so its last token has not seen the whole.
    """
    model, device = inputs.model, inputs.model.device
    if kind_of(model) != "causal":
        raise ValueError(f"linear_probe reads causal language models, and this is {type(model).__name__}: use zero_shot")
    limit, encoder = context_length(model, inputs.config.max_length), encoder_for(model)
    encoded, pad = encoder.encode(inputs.task, rows, inputs.tokenizer, limit), encoder.pad_id(inputs.tokenizer)
    # The ids before the options, which all options share.
    prompts = [e.options[0].ids[: 1 + min(option.first for option in e.options)] for e in encoded]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    states: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, len(order), AT_ONCE):
        chosen = order[start : start + AT_ONCE]
        ids, mask = (part.to(device) for part in pad_rows([prompts[index] for index in chosen], pad))
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        last = output.hidden_states[-1][torch.arange(len(chosen), device=device), mask.sum(1) - 1]
        for index, state in zip(chosen, last.double().cpu(), strict=True):
            states[index] = state
    return Features(torch.stack(states), torch.tensor([example.gold[0] for example in encoded]))


def fit(found: Features, classes: int, strength: float, iterations: int = 200) -> Probe:
    """Multinomial logistic regression with an L2 penalty on the weights, by L-BFGS in float64: convex, no seed."""
    mean, spread = found.states.mean(0), found.states.std(0, correction=0).clamp_min(1e-12)
    states = ((found.states - mean) / spread).clone()  # a tensor of inference mode has no place in a graph
    targets = found.classes.clone()
    weight = torch.zeros(states.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(states @ weight + bias, targets) + 0.5 * strength * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # pyright: ignore[reportArgumentType]  # torch asks for a float, and takes a tensor
    return Probe(mean, spread, weight.detach(), bias.detach())


def _scores(probe: Probe, found: Features) -> Scores:
    logits = probe.logits(found.states)
    right = tuple((logits.argmax(1) == found.classes).double().tolist())
    loss = torch.nn.functional.cross_entropy(logits, found.classes).item()
    return Scores(loss, "accuracy", sum(right) / len(right), len(right), rowwise=right)
