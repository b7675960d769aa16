"""Leaving parameters as they are, by name: for checkpoints some of whose tensors are no parameters of the original model."""

from __future__ import annotations

import re

from torch import nn


def check_pattern(freeze: str | None) -> None:
    """Raise ValueError where the pattern is no regular expression."""
    try:
        re.compile(freeze or "")
    except re.error as error:
        raise ValueError(f"freeze={freeze!r} is no regular expression: {error}") from error


def freeze_matching(model: nn.Module, freeze: str | None) -> list[nn.Parameter]:
    """Freeze the parameters whose name the regular expression finds; those that were trainable before, to thaw again.

    Raises:
        ValueError: it finds no parameter, or leaves none to train.
    """
    if freeze is None:
        return []
    names = [name for name, _ in model.named_parameters()]
    found = [parameter for name, parameter in model.named_parameters() if re.search(freeze, name)]
    if not found:
        raise ValueError(f"freeze={freeze!r} finds no parameter; names look like {names[0]!r}")
    changed = [parameter for parameter in found if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        thaw(changed)
        raise ValueError(f"freeze={freeze!r} finds every trainable parameter: nothing would be trained")
    return changed


def thaw(parameters: list[nn.Parameter]) -> None:
    """Make parameters trainable again."""
    for parameter in parameters:
        parameter.requires_grad_(True)
