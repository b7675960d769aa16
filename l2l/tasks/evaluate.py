"""Loss and metric of a model on the rows of a task, by scored options or greedily generated answers."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from l2l.models import Grouping, generator, uncompiled
from l2l.models.heads import JoinedParts, read_logits, target_logprobs
from l2l.models.load import context_length, kind_of, unwrapped
from l2l.tasks.base import Example, Row, Task
from l2l.tasks.encode import Encoded, collate, decoder_start, encoder_for, lay_out, pad_rows, special_ids, tokenize
from l2l.tasks.losses import classification_loss, gold_token_sum, option_scores, option_sums, predictions
from l2l.tasks.metrics import accuracy, answer_scores, bootstrap_interval, exact_matches, option_metrics

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from l2l.tasks.encode import Batch


@dataclass(frozen=True)
class Scores:
    """How good a model is on a task."""

    loss: float
    """In the task's own form, in nats: the mean over examples (classification) or over gold tokens (lm)."""
    metric: str
    """``accuracy``, ``f1`` or ``exact_match``."""
    value: float
    """The metric, between 0 and 1."""
    n: int
    """How many rows were scored."""
    official: dict[str, float] = field(default_factory=dict, hash=False)
    """The benchmark's own metrics, by name, where they differ from ``value``: between 0 and 1, but for a perplexity."""
    rowwise: tuple[float, ...] = field(default=(), repr=False)
    """The metric of each row, in order; its mean is ``value`` up to rounding."""
    answers: tuple[str, ...] = field(default=(), repr=False)
    """What the model chose or wrote for each row."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``value`` over draws of the rows; see :func:`l2l.tasks.metrics.bootstrap_interval`."""
        return bootstrap_interval(self.rowwise)

    def plain(self) -> dict[str, Any]:
        """The figures of a summary, with the interval in place of what is known of each row."""
        figures = {name: value for name, value in vars(self).items() if name not in ("rowwise", "answers")}
        return figures | {"interval": list(self.interval)}


@torch.inference_mode()
def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    rows: Sequence[Row],
    batch_size: int = 32,
    max_length: int | None = None,
    advance: Callable[[int], None] | None = None,
    grouping: Grouping | None = None,
    calibrate: bool = False,
    max_new_tokens: int = 50,
) -> Scores:
    """Score a model in eval mode; its mode is put back afterwards.

    The loss does not depend on ``batch_size``: sums are taken over all rows before dividing. A prediction is
    right if it is among the example's correct options.

    Args:
        model, tokenizer: a language model of any kind (:mod:`l2l.models.kinds`), on any device.
        task, rows: the task and at least one row of it.
        batch_size: examples per forward pass; each brings its options.
        max_length: most tokens of prompt and option; ``None`` takes the model's context, at most 2048.
        advance: called with the number of rows after each batch that was scored, and after each whose answers were
            generated.
        grouping: says how long a row may be in which options share their prompt. ``None`` asks the model, where some
            example has options for it; a caller that evaluates often gives what it found once. Batches are fed whole.
        calibrate: choose the option whose log-probability rises most over that after the task's context-less prompt
            (:func:`without_context`). The loss stays uncalibrated.
        max_new_tokens: most tokens of a generated answer, where the task does not say.

    Raises:
        ValueError: there are no rows, one cannot be rendered or encoded, ``max_length`` is more than the model's
            positions, or ``calibrate`` is asked of a task without a context-less prompt.
    """
    if not rows:
        raise ValueError(f"task {task.name!r}: no rows to evaluate on")
    bare = without_context(task) if calibrate else None
    limit, encoder = context_length(model, max_length), encoder_for(model)
    score = partial(_score_options, model, encoder.pad_id(tokenizer), batch_size)
    was_training = model.training
    model.eval()
    try:
        encoded = encoder.encode(task, rows, tokenizer, limit)
        sharing = _sharing(model, encoded) if grouping is None else replace(grouping, groups=1)
        loss, chosen, sums, likeliest = score(advance, task, encoded, sharing)
        if bare is not None:
            alone = encoder.encode(bare, rows, tokenizer, limit)
            distinct = list(dict.fromkeys(alone))  # many rows share a context-less prompt
            without = dict(zip(distinct, score(None, bare, distinct, _sharing(model, distinct))[2], strict=True))
            chosen = [calibrated_choice(whole, without[one]) for whole, one in zip(sums, alone, strict=True)]
        examples, official = [task.example(row) for row in rows], {}
        if task.generates:
            texts = generate_answers(model, tokenizer, task, examples, limit, max_new_tokens, batch_size, advance)
            references = [example.answers for example in examples]
            if task.scoring is not None:
                rowwise = exact_matches(texts, references, task.scoring)
                value = fmean(rowwise)
            else:
                value, _ = answer_scores(texts, references)
                rowwise = [answer_scores([t], [e.answers])[0] for t, e in zip(texts, examples, strict=True)]
        elif task.scoring is not None and bare is None:
            chosen, rowwise, official = option_metrics(task.scoring, examples, sums, likeliest)
            texts = [example.options[choice] for example, choice in zip(examples, chosen, strict=True)]
            value = fmean(rowwise)
            official = {} if task.scoring.metrics == ("acc",) else official
        else:
            texts = [example.options[choice] for example, choice in zip(examples, chosen, strict=True)]
            value = accuracy(chosen, [example.gold for example in encoded])
            rowwise = [float(choice in example.gold) for choice, example in zip(chosen, encoded, strict=True)]
    finally:
        model.train(was_training)
    if task.official is not None:
        official = task.official(rows, texts)
    return Scores(loss, task.metric, value, len(rows), official, tuple(rowwise), tuple(texts))


def visits(task: Task, rows: Sequence[Row]) -> int:
    """How many rows :func:`evaluate` reports to ``advance``, without those of a calibration."""
    return len(rows) * (2 if task.generates else 1)


def _sharing(model: "PreTrainedModel", encoded: list[Encoded]) -> Grouping:
    """As in a run. How long rows that branch may be is only tested where some example would have one."""
    anything = Grouping(tree=sys.maxsize)
    plain = [one for one in encoded if not one.whole]
    wanted = any(lay_out([[option.fed for option in one.options]], anything).branching for one in plain)
    return Grouping.of(model, 1, None if wanted else False)


def _score_options(
    model: "PreTrainedModel",
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None] | None,
    task: Task,
    encoded: list[Encoded],
    grouping: Grouping,
) -> tuple[float, list[int], list[list[float]], list[list[bool]]]:
    """Mean loss; the best scored option of each example; the log-probabilities of each example's options, in nats; whether
    each token of an option is the likeliest at its place."""
    chosen = [0] * len(encoded)
    sums: list[list[float]] = [[]] * len(encoded)
    likeliest: list[list[bool]] = [[]] * len(encoded)
    total, weight = 0.0, 0
    for indices, batch in _option_batches(model, pad_id, batch_size, encoded, grouping):
        logprobs, others = read_logits(model, batch, batch.parts, _logprobs_and_others).unbind(1)
        scores, values = option_scores(logprobs, batch), option_sums(logprobs, batch).tolist()
        flags = [count == 0 for count in option_sums(others, batch).tolist()]
        if task.form == "lm":
            gold, count = gold_token_sum(logprobs, batch)
            total, weight = total - gold.item(), weight + int(count)
        else:
            total, weight = total + classification_loss(scores, batch).item() * batch.n, weight + batch.n
        for index, choice in zip(indices, predictions(scores, batch).tolist(), strict=True):
            chosen[index] = choice
            count = len(encoded[index].options)
            sums[index], values = values[:count], values[count:]
            likeliest[index], flags = flags[:count], flags[count:]
        if advance is not None:
            advance(len(indices))
    return total / weight, chosen, sums, likeliest


def _logprobs_and_others(logits: torch.Tensor, joined: JoinedParts) -> torch.Tensor:
    """[K, 2] of float32 logits [P, vocabulary]: the target's log-probability, and 1 where another token is likelier, else 0."""
    others = logits.argmax(1)[joined.places] != joined.targets
    return torch.stack([target_logprobs(logits, joined), others.float()], 1)


def _option_batches(
    model: "PreTrainedModel", pad_id: int, batch_size: int, encoded: Sequence[Encoded], grouping: Grouping
) -> Iterator[tuple[list[int], "Batch"]]:
    """Examples with all their options, batch by batch, and where each is in ``encoded``."""
    # Long examples first: memory runs out at once or not at all, and like lengths share a batch.
    order = sorted(range(len(encoded)), key=lambda index: -max(len(option.ids) for option in encoded[index].options))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, collate([encoded[index] for index in indices], "classification", pad_id, model.device, grouping)


def evaluation_batches(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    rows: Sequence[Row],
    max_length: int | None,
    grouping: Grouping,
    batch_size: int = 32,
) -> Iterator["Batch"]:
    """What :func:`evaluate` feeds the model to score options; arguments and errors are its own."""
    encoder = encoder_for(model)
    encoded = encoder.encode(task, rows, tokenizer, context_length(model, max_length))
    for _, batch in _option_batches(model, encoder.pad_id(tokenizer), batch_size, encoded, replace(grouping, groups=1)):
        yield batch


def without_context(task: Task) -> Task:
    """The same task with the context-less prompt in place of the usual one, to calibrate option scores by.

    Options compete by their wording too: a common word is likely after any prompt. The calibrated score of an option is
    its log-probability after the prompt, less its log-probability after the prompt without the passage, sentence or
    premise (Holtzman et al., 2021). Both are sums over the option's tokens.

    Raises:
        ValueError: the task generates its answers, or declares no context-less prompt.
    """
    bare = task.contextless
    if task.generates:
        raise ValueError(f"task {task.label!r} generates its answers; only scored options can be calibrated")
    if bare is None:
        raise ValueError(
            f"task {task.label!r} has no context-less prompt to calibrate by; give its Task one "
            f"(contextless=lambda row: ...), or score without calibration"
        )
    return replace(task, example=lambda row: replace(task.example(row), prompt=bare(row)))


def calibrated_choice(sums: Sequence[float], contextless: Sequence[float]) -> int:
    """Index of the option whose log-probability the context raises most; the first one where several are equal."""
    return int((torch.tensor(sums) - torch.tensor(contextless)).argmax())


_STOPS: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[int]]]" = WeakKeyDictionary()
"""Size of the vocabulary and tokens that end an answer, per tokenizer: finding them decodes the whole vocabulary."""


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    examples: Sequence[Example],
    max_length: int,
    max_new_tokens: int = 50,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """The generated answers of a task's examples. Where the task says how an answer ends, and how long it may be, that
    holds in place of the line's end and of ``max_new_tokens``; other arguments and errors are those of :func:`generate`."""
    prompts, until = [example.prompt for example in examples], None if task.scoring is None else task.scoring.until
    limits: dict[str, Any] = {"max_new_tokens": task.new_tokens(max_new_tokens), "batch_size": batch_size}
    return generate(model, tokenizer, prompts, max_length, advance=advance, until=until, **limits)


@torch.inference_mode()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_length: int,
    max_new_tokens: int = 50,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
    until: Sequence[str] | None = None,
) -> list[str]:
    """Continue each prompt greedily until the first newline, the end-of-text token, or ``max_new_tokens``.

    A prompt keeps its last ``max_length - max_new_tokens`` tokens (and its leading BOS), so that prompt and answer
    fit into ``max_length``. An encoder-decoder is fed the prompt as the tokenizer frames a text, and answers in rows of
    their own. Returns the answers, in order, without the newline and outer white space. ``advance`` is called with the number
    of prompts after each batch. Where ``until`` is given, an answer ends before the first of these texts instead of at a
    newline, and keeps its outer white space.

    Raises:
        ValueError: ``max_length`` leaves no room for a prompt, or the model cannot generate.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    continue_text, kind = generator(model), kind_of(model)
    if continue_text is None or kind not in ("causal", "seq2seq"):
        raise ValueError(f"{type(model).__name__} cannot generate text; use a causal or seq2seq language model")
    before, after = special_ids(tokenizer)
    opening = (decoder_start(model), *before) if kind == "seq2seq" else ()
    room = max_length - len(before) - (len(after) if opening else max_new_tokens)
    if min(room, max_length - len(opening) - max_new_tokens) < 1:
        raise ValueError(
            f"max_length {max_length} leaves no room for a prompt beside {max_new_tokens} new tokens; raise max_length"
        )
    stops = _line_ends(tokenizer) if until is None else [end] if isinstance(end := tokenizer.eos_token_id, int) else []
    pad = encoder_for(model).pad_id(tokenizer)
    inputs = [before + ids[-room:] + (after if opening else ()) for ids in tokenize(tokenizer, list(prompts))]
    greedy = GenerationConfig(  # a fresh one: a model's own may ask for sampling, penalties or beams
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad,
        decoder_start_token_id=opening[0] if opening else None,
    )
    continue_greedily = partial(continue_text, generation_config=greedy)
    # Prompts of like length go together, which saves padding.
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    texts = [""] * len(inputs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # An encoder counts its positions from the left, a decoder goes on at the right.
        ids, mask = pad_rows([inputs[index] for index in chosen], pad, left=not opening)
        fed: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if opening:
            fed["decoder_input_ids"] = torch.tensor([opening] * len(chosen), device=model.device)
        if until:
            fed["stopping_criteria"] = StoppingCriteriaList([AnswerEnds(tokenizer, until)])
        with generation_config(model, greedy), uncompiled(model):  # its key-value cache grows with every token
            output = continue_greedily(**fed)
        given = len(opening) or fed["input_ids"].shape[1]
        batch = tokenizer.batch_decode(output[:, given:], skip_special_tokens=True)
        for index, text in zip(chosen, batch, strict=True):
            texts[index] = text.split("\n")[0].strip() if until is None else _before(text, until)
        if advance is not None:
            advance(len(chosen))
    return texts


def _line_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end of text, and every token whose text contains a newline."""
    size, stops = _STOPS.get(tokenizer, (-1, []))
    if size != len(tokenizer):
        pieces, end = tokenizer.batch_decode([[index] for index in range(len(tokenizer))]), tokenizer.eos_token_id
        found = {index for index, text in enumerate(pieces) if "\n" in text}
        stops = sorted(found | {end}) if isinstance(end, int) else sorted(found)
        _STOPS[tokenizer] = len(tokenizer), stops
    return stops


class AnswerEnds:
    """A stopping criterion: rows whose new tokens hold one of some texts, wherever tokens begin and end in it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", until: Sequence[str]) -> None:
        self.tokenizer, self.until = tokenizer, tuple(until)
        self.given: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if self.given is None:  # the first call is after the first new token; a prompt of vectors has no ids
            self.given = input_ids.shape[1] - 1
        texts = self.tokenizer.batch_decode(input_ids[:, self.given :])
        ended = [any(one in text for one in self.until) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _before(text: str, until: Sequence[str]) -> str:
    """The text before the first of the texts that end it."""
    for one in until:
        text = text.split(one)[0]
    return text


@contextmanager
def generation_config(model: object, config: "GenerationConfig") -> Iterator[None]:
    """Inside it, replace the model's own config, from which transformers would fill what ``config`` leaves open."""
    owner = unwrapped(model)
    own = getattr(owner, "generation_config", None)
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own
