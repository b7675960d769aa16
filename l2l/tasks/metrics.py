"""Scores of predicted answers, between 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence


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
