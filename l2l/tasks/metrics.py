"""Scores of predicted answers, between 0 and 1, and bootstrap intervals of their means."""

import re
import string
from collections.abc import Hashable, Sequence
from math import exp
from statistics import fmean

import numpy as np

from l2l.tasks.base import Example, Scoring

COVERAGE = 0.95
RESAMPLES = 5_000
_AT_ONCE = 2_000_000
"""Most numbers that are drawn at a time."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_DIGITS = str.maketrans("", "", string.digits)


def answer_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Mean token F1 and mean exact match of generated answers, by SQuAD's rule.

    Texts are lower-cased and lose punctuation and articles; each prediction counts by its best reference answer.

    Raises:
        ValueError: the two lists differ in length or are empty, or an example has no reference answer.
    """
    from torchmetrics.functional.text import squad

    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(answers)} lists of answers")
    if not all(answers):
        raise ValueError(f"example {[bool(a) for a in answers].index(False)} has no reference answer to score against")
    predicted = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(predictions)]
    expected = [
        {"answers": {"text": list(texts), "answer_start": [0] * len(texts)}, "id": str(number)}
        for number, texts in enumerate(answers)
    ]
    percent = squad(predicted, expected)
    return percent["f1"].item() / 100, percent["exact_match"].item() / 100


def accuracy(predictions: Sequence[int], gold: Sequence[Sequence[int]]) -> float:
    """Share of predictions that are among the correct options of their example.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    if not predictions or len(predictions) != len(gold):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(gold)} examples")
    return sum(choice in correct for choice, correct in zip(predictions, gold, strict=True)) / len(gold)


def best_option(metric: str, sums: Sequence[float], choices: Sequence[str]) -> int:
    """Index of the option that a metric of lm-evaluation-harness chooses; the first one where several are equal.

    Args:
        metric: ``acc``: the likeliest. ``acc_norm``, ``acc_bytes``: that of the highest log-probability per character, or
            per byte of UTF-8, of the choice.
        sums: log-probability of each option, in nats.
        choices: their texts, without what joins them to the prompt.

    Raises:
        ValueError: there is no such metric.
    """
    lengths = {"acc": lambda _: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    if metric not in lengths:
        raise ValueError(f"metric {metric!r} chooses no option; the metrics that do are {', '.join(lengths)}")
    return int(np.argmax([value / lengths[metric](text) for value, text in zip(sums, choices, strict=True)]))


def option_metrics(
    scoring: Scoring, examples: Sequence[Example], sums: Sequence[Sequence[float]], likeliest: Sequence[Sequence[bool]]
) -> tuple[list[int], list[float], dict[str, float]]:
    """What lm-evaluation-harness makes of scored options.

    Args:
        examples: with their ``choices``; one whose only option is the text to predict has a single one.
        sums: log-probability of each option of each example, in nats.
        likeliest: whether each of an option's tokens is the likeliest at its place.

    Returns:
        The option that the first metric chooses for each example; whether that is right (of single options: whether each
        token is the likeliest), 1 or 0; and all metrics by name. A perplexity is the exponential of the negative mean
        log-probability of whole texts, as it is there, not of tokens.
    """
    rows: dict[str, list[float]] = {}
    chosen = [0] * len(examples)
    single = all(len(example.options) == 1 for example in examples)
    for metric in scoring.metrics:
        if metric == "perplexity":
            continue
        if single:
            rows[metric] = [float(flags[0]) for flags in likeliest]
            continue
        best = [best_option(metric, values, example.choices) for values, example in zip(sums, examples, strict=True)]
        rows[metric] = [float(choice in example.gold) for choice, example in zip(best, examples, strict=True)]
        chosen = best if len(rows) == 1 else chosen
    found = {name: fmean(values) for name, values in rows.items()}
    if "perplexity" in scoring.metrics:
        found["perplexity"] = exp(-fmean(values[0] for values in sums))
    return chosen, next(iter(rows.values())), found


def exact_matches(predictions: Sequence[str], answers: Sequence[Sequence[str]], scoring: Scoring) -> list[float]:
    """1 for each prediction that equals one of its reference answers, else 0, by lm-evaluation-harness' rule.

    Texts are compared as they are, a space at their beginning included, but for what ``scoring`` ignores, in this order:
    what its regular expressions match, case, punctuation, digits.
    """

    def plain(text: str) -> str:
        for pattern in scoring.regexes_to_ignore:
            text = re.sub(pattern, "", text)
        text = text.lower() if scoring.ignore_case else text
        text = text.translate(_NO_PUNCTUATION) if scoring.ignore_punctuation else text
        return text.translate(_NO_DIGITS) if scoring.ignore_numbers else text

    return [float(plain(one) in map(plain, texts)) for one, texts in zip(predictions, answers, strict=True)]


def grouped_scores(groups: Sequence[Hashable], predicted: Sequence[bool], gold: Sequence[bool]) -> dict[str, float]:
    """MultiRC's own metrics (Khashabi et al., 2018): ``f1a`` over all answers, ``exact_match`` over groups.

    ``groups`` says which question an answer belongs to; a question is exact if all its answers here are judged right.
    ``f1a`` is the F1 of the answers called right, 0 where no such answer was found.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if not groups or not len(groups) == len(predicted) == len(gold):
        raise ValueError(f"cannot score {len(predicted)} predictions against {len(gold)} answers, {len(groups)} groups")
    hits = sum(p and g for p, g in zip(predicted, gold, strict=True))
    called = sum(predicted) + sum(gold)
    exact: dict[Hashable, bool] = {}
    for group, p, g in zip(groups, predicted, gold, strict=True):
        exact[group] = exact.get(group, True) and p == g
    return {"f1a": 2 * hits / called if called else 0.0, "exact_match": sum(exact.values()) / len(exact)}


def span_scores(predictions: Sequence[str], answers: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """DROP's own ``f1`` and ``exact_match`` (Dua et al., 2019), means over examples.

    An example has alternative answers, each of one or more spans, and counts by the best. A prediction is one span: it
    is exact only for an answer of one span, and its F1 is that with the span it matches best, divided by the number of
    spans. If a span holds numbers, one of them must be in the prediction, or the F1 with it is 0. Texts are
    lower-cased, lose punctuation and articles, and numbers are compared by value. An example's F1 is rounded to two
    digits, as the benchmark does.

    Raises:
        ValueError: the two lists differ in length or are empty, or an example has no answer or an answer no span.
    """
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(answers)} lists of answers")
    for number, alternatives in enumerate(answers):
        if not alternatives or not all(alternatives):
            raise ValueError(f"example {number} has no reference answer to score against")
    best, exact = [], 0
    for text, alternatives in zip(predictions, answers, strict=True):
        said = _number_words(text)
        meant = [[_number_words(span) for span in spans] for spans in alternatives]
        best.append(max(round(max(_word_f1(set(said), set(words)) for words in spans) / len(spans), 2) for spans in meant))
        exact += [said] in meant
    return {"f1": sum(best) / len(best), "exact_match": exact / len(best)}


def _word_f1(said: set[str], meant: set[str]) -> float:
    """F1 of two sets of words; 0 where the meant one has numbers and shares none of them."""
    numbers = {word for word in meant if _is_number(word)}
    if numbers and not numbers & said:
        return 0.0
    common = len(said & meant)
    precision = common / len(said) if said else 1.0
    recall = common / len(meant) if meant else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _number_words(text: str) -> list[str]:
    """The words of a text as DROP compares them: without case, articles and punctuation; numbers by their value."""
    found = []
    for word in re.split(r"[ -]", text.lower()):
        bare = word if _is_number(word) else word.translate(_NO_PUNCTUATION)
        found += [str(float(bare))] if _is_number(bare) else re.sub(r"\b(a|an|the)\b", " ", bare).split()
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def bootstrap_interval(scores: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of per-row scores (Efron, 1979), rows drawn with replacement.

    It covers the sampling of rows, not the seed of training. Where every row has the same score its width is 0, however
    few rows there are. The same scores in the same order give the same interval.

    Args:
        scores: of each row, between 0 and 1: right or wrong, or F1.
        resamples, seed: number of draws and their seed.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("an interval needs at least one score, got none")
    table, generator = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    chunk = max(1, _AT_ONCE // len(table))
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    means = np.concatenate([table[generator.integers(len(table), size=(size, len(table)))].mean(1) for size in sizes])
    outside = (1 - COVERAGE) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)


def format_interval(value: float, ends: Sequence[float], digits: int = 3) -> str:
    """A value with its interval, for tables: ``0.712 [0.671, 0.752]``."""
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
