"""Examples as a model sees them: pieces of text, one per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2l.models.prompt_trees import Ids
from l2l.tasks.base import Example, Row, Task
from l2l.tasks.texts import option_starts, special_ids, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 60
"""Most tokens of a prompt that are shown: its last ones."""
_FEW = 6
"""Most options of an example that are shown, the right one among them."""


@dataclass(frozen=True)
class Asked:
    """One example, tokenised in full."""

    example: Example
    prefix: Ids
    """What the tokenizer puts before every text."""
    prompt: Ids
    """What all options have before them."""
    options: tuple[Ids, ...]
    """Each option's own tokens."""
    merged: bool
    """Whether a token spans the boundary of the prompt and some option."""

    @property
    def longest(self) -> int:
        """Tokens of the row with the longest option."""
        return len(self.prefix) + len(self.prompt) + max(map(len, self.options))


def ask(task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """Tokenise rows, nothing cut.

    Raises:
        ValueError: a row cannot be rendered, or an option has no token of its own.
    """
    prefix = special_ids(tokenizer)[0]
    found = []
    for one in tokenized(task, rows, tokenizer):
        starts = option_starts(one.prompt, one.texts, one.name)
        options = tuple(text[start:] for text, start in zip(one.texts, starts, strict=True))
        merged = min(starts) < len(one.prompt)
        found.append(Asked(one.example, prefix, one.prompt[: min(starts)], options, merged))
    return found


def shown(tokenizer: PreTrainedTokenizerBase, one: Asked, number: int) -> str:
    """An example in print: ``·`` between tokens, ``‖`` between prompt and option, ``*`` before a right option."""
    pieces = _pieces(tokenizer, (*one.prefix, *one.prompt))
    cut = f"… {len(pieces) - _TAIL} tokens … " if len(pieces) > _TAIL else ""
    lines = [f"example {number + 1}", f"  {cut}{'·'.join(pieces[-_TAIL:])}"]
    order = sorted(range(len(one.options)), key=lambda option: option not in one.example.gold)[:_FEW]
    for option in sorted(order):
        ids = one.options[option]
        mark = "*" if option in one.example.gold else " "
        lines.append(f"  ‖ {mark} {'·'.join(_pieces(tokenizer, ids))}  {list(ids)}")
    left = len(one.options) - len(order)
    return "\n".join(lines + ([f"  … and {left} more options"] if left else []))


def visible(text: str) -> str:
    """A text with its white space to be seen, as byte-pair and sentence-piece vocabularies' own signs are."""
    return (
        text.replace("\n", "⏎")
        .replace("\t", "⇥")
        .replace(" ", "␣")
        .replace("Ġ", "␣")
        .replace("▁", "␣")
        .replace("Ċ", "⏎")
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [visible(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
