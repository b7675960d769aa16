"""Rewards as objectives: the model completes prompts, a function of the user scores the completions, their mean is maximised.

The function has the signature of TRL's reward functions: ``(prompts, completions, **columns) -> list of floats``, with the
further fields of the prompts' rows as columns. What is minimised is minus the reward of each row of a batch, [b].
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

import torch

from l2l.models.load import context_length
from l2l.models.prompt_trees import Ids
from l2l.noise import Key
from l2l.plugins import load_module
from l2l.report.run_directory import write_whole
from l2l.tasks import Row, Task
from l2l.tasks.base import Example, GivenData
from l2l.tasks.encode import Encoded, EncodedOption, special_ids, tokenize
from l2l.tasks.evaluate import Scores
from l2l.tasks.sources import read_file
from l2l.train.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardFunction: TypeAlias = Callable[..., Sequence[float]]
"""``reward(prompts=..., completions=..., **columns)``: a finite float for each completion; larger is better. Each argument is a
list with a value per completion. A completion of a prompt that is a text is a text; of a chat it is
``[{"role": "assistant", "content": text}]``. It must return the same numbers for the same arguments."""

REWARD, PROMPT = "reward", "prompt"
"""Name of the objective, of the task and of the metric; and the field of a row that holds the prompt."""
RESERVED = ("prompts", "completions")
"""Arguments of a reward function that no column can be called."""
EVALUATION = -1
"""Step of the key of all evaluations: they share their noise, so that two of them differ by the weights alone."""
BEFORE, AFTER = "completions_before.jsonl", "completions_after.jsonl"
"""In a run's directory: completions of the dev prompts by the untrained weights, and by the best ones."""
SHORT = 60
"""Characters of a prompt that an error shows."""


@dataclass(frozen=True)
class GivenReward:
    """What a caller in Python gives as objects where a configuration has names."""

    function: RewardFunction | None = None
    rows: tuple[Row, ...] | None = None

    @staticmethod
    def of(reward: object, prompts: object) -> "tuple[GivenReward | None, str | None, str | None]":
        """The objects among a reward and its prompts, None where both are names; and the names that a run records.

        Raises:
            ValueError: one of them is neither.
        """
        function = rows = None
        if reward is not None and not isinstance(reward, str):
            if not callable(reward):
                raise ValueError(f"reward={reward!r} must be a function, or its name as package.module:function")
            function = cast(RewardFunction, reward)
            reward = f"{getattr(reward, '__module__', type(reward).__module__)}:{getattr(reward, '__qualname__', type(reward))}"
        if isinstance(prompts, Path):
            prompts = str(prompts)
        if prompts is not None and not isinstance(prompts, str):
            rows = tuple(cast(Sequence[Row], prompts))
            prompts = f"{len(rows)} rows"
        given = None if function is None and rows is None else GivenReward(function, rows)
        return given, cast("str | None", reward), cast("str | None", prompts)


def check_named(reward: str | None, prompts: str | None, temperature: float) -> bool:
    """Whether a configuration has a reward; ValueError where the fields that it takes are not what they must be."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number, at least 0")
    if reward is None and prompts is not None:
        raise ValueError(f"prompts={prompts!r} are for a reward, and none is given: give a reward, or leave prompts out")
    if reward is not None and ":" not in reward:
        raise ValueError(f"reward={reward!r} must name a function, as package.module:function or file.py:function")
    if reward is not None and prompts is None:
        raise ValueError(
            f"reward={reward!r} scores completions of prompts, and none are given: give prompts, a file of JSON lines"
        )
    return reward is not None


def find_function(path: str) -> RewardFunction:
    """The reward function that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        ValueError: there is no such module, file or function.
    """
    module, _, name = path.rpartition(":")
    found = getattr(load_module(module, f"reward {path!r}"), name, None)
    if not callable(found):
        raise ValueError(f"reward {path!r}: module {module!r} has no function {name!r}")
    return cast(RewardFunction, found)


def check_columns(name: str, function: RewardFunction, columns: Sequence[str]) -> None:
    """Raise ValueError where a reward function cannot be called with the columns that the prompts' rows have."""
    if taken := [column for column in columns if column in RESERVED]:
        raise ValueError(f"a column of the prompts is called {taken[0]!r}, as an argument of every reward: rename the column")
    try:
        inspect.signature(function).bind(**dict.fromkeys((*RESERVED, *columns)))
    except TypeError as error:
        told = ", ".join((*RESERVED, *columns))
        raise ValueError(f"reward {name!r} is called with {told} by name, and does not fit: {error}; add **columns") from error
    except ValueError:  # a function of C tells no signature
        return


# Prompts.


def read_prompts(path: str | Path) -> tuple[list[Row], list[str]]:
    """Rows of a file of JSON lines, and where each is (``FILE:LINE``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, or a line is no JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of prompts {str(path)!r}: give one of JSON lines, each with a field {PROMPT!r}")
    if file.suffix != ".jsonl":
        raise ValueError(f"prompts={str(path)!r} must be a file of JSON lines, and its name end in .jsonl")
    found = [(row, where) for where, row in read_file(file)]
    return [row for row, _ in found], [where for _, where in found]


def check_rows(rows: Sequence[Row], places: Sequence[str]) -> tuple[str, ...]:
    """The columns beside the prompt, which all rows share.

    Args:
        places: opens the message of each row's errors.

    Raises:
        ValueError: there are no rows; or a row has no prompt, an empty one, one that is neither a text nor a chat, or other
            columns than the first row.
    """
    if not rows:
        raise ValueError(f"the prompts have no row: give at least 3, each with a field {PROMPT!r}")
    for row, where in zip(rows, places, strict=True):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: a row must map names to values, not be a {type(row).__name__}")
        if row.get(PROMPT) is None:
            raise ValueError(f"{where}: field {PROMPT!r} is missing; the row has {', '.join(map(str, row)) or 'no field'}")
        _check_prompt(row[PROMPT], where)
        if other := sorted(set(rows[0]).symmetric_difference(row), key=str):
            which = "missing" if other[0] in rows[0] else "not in the first row"
            raise ValueError(f"{where}: column {other[0]!r} is {which}: all rows need the same columns")
    return tuple(name for name in rows[0] if name != PROMPT)


def _check_prompt(prompt: object, where: str) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty: give it a text, or leave the row out")
        return
    messages: list[Any] = prompt if isinstance(prompt, list) else []
    fine = [isinstance(m, dict) and all(isinstance(m.get(name), str) for name in ("role", "content")) for m in messages]
    if not fine or not all(fine):
        raise ValueError(
            f"{where}: the prompt must be a text, or a chat as a list of {{'role': ..., 'content': ...}} of texts, "
            f"not {_short(prompt)}"
        )


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= SHORT else f"{text[:SHORT]}…"


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Any, where: str) -> Ids:
    """What the model is fed: the tokens of a text behind those that begin every text, or of a chat by the tokenizer's template,
    up to where the answer begins.

    Raises:
        ValueError: a chat, and the tokenizer has no chat template, or it does not take this one; or there are no tokens.
    """
    if isinstance(prompt, str):
        found = (*special_ids(tokenizer)[0], *tokenize(tokenizer, [prompt])[0])
    elif not tokenizer.chat_template:
        raise ValueError(f"{where}: the prompt is a chat, and the tokenizer has no chat template: give a text")
    else:
        try:
            text = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # whatever a template raises
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{where}: the tokenizer's chat template does not take the prompt: {line}") from error
        found = tokenize(tokenizer, [text])[0]  # a template brings the tokens that begin a text
    if not found:
        raise ValueError(f"{where}: the prompt has no tokens: give it a text, or leave the row out")
    return found


def prompts_task(rows: Sequence[Row]) -> Task:
    """The rows as a task, which splits them as it does those of any task whose rows come as one file."""
    return Task(REWARD, GivenData(tuple(rows)), (PROMPT,), _example, form="lm", metric=REWARD)


def _example(row: Row) -> Example:
    return Example(row[PROMPT] if isinstance(row[PROMPT], str) else json.dumps(row[PROMPT], sort_keys=True), ())


def load_reward(
    name: str | None, prompts: str | None, given: GivenReward | None
) -> "tuple[Reward | None, Sequence[Row], Sequence[str]]":
    """The reward of these names, None where there is none; the rows of its prompts; and where each is, for errors.

    Args:
        given: objects of which these are names.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: no such function; rows are not as they must be, or do not fit the function.
    """
    if name is None:
        return None, (), ()
    function = find_function(name) if given is None or given.function is None else given.function
    if given is None or given.rows is None:
        rows, places = read_prompts(prompts or "")
    else:
        rows, places = given.rows, [f"row {number} of the prompts" for number in range(len(given.rows))]
    columns = check_rows(rows, places)
    check_columns(name, function, columns)
    return Reward(name, function, columns), rows, places


# Rewards.


@dataclass(frozen=True)
class Completed:
    """A prompt, a completion of it, and its reward."""

    prompt: Any
    completion: str
    reward: float


@dataclass(frozen=True)
class RewardScores(Scores):
    """Mean reward on rows: ``loss`` is its negative, ``rowwise`` the mean of each prompt's completions."""

    completed: tuple[Completed, ...] = field(default=(), repr=False)
    """All completions, prompt by prompt."""

    def plain(self) -> dict[str, Any]:
        """The figures of a summary, with the standard error of the mean over prompts; None of a single one."""
        figures = {name: value for name, value in super().plain().items() if name != "completed"}
        return figures | {"standard_error": standard_error(self.rowwise)}


@final
@dataclass(frozen=True)
class Reward:
    """A reward function, with what it takes to call it."""

    name: str
    """As ``package.module:function``: for errors."""
    function: RewardFunction
    columns: tuple[str, ...] = ()
    """Fields of a row beside the prompt."""
    ids: Mapping[str, Ids] = field(default_factory=dict, repr=False)
    """Token ids of each prompt, by its JSON."""

    def encoded(
        self,
        rows: Sequence[Row],
        places: Sequence[str],
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        longest: int,
        room: int | None,
    ) -> "Reward":
        """The same with the token ids of prompts.

        Args:
            places: opens the message of each row's errors.
            longest: most tokens of a completion.
            room: most tokens of prompt and completion; None: the model's context.

        Raises:
            ValueError: a prompt leaves no room for its completion, or as :func:`prompt_ids`.
        """
        limit, found = context_length(model, room), dict[str, Ids]()
        for row, where in zip(rows, places, strict=True):
            own = found[_name(row)] = prompt_ids(tokenizer, row[PROMPT], where)
            if len(own) + longest > limit:
                raise ValueError(
                    f"{where}: the prompt has {len(own)} tokens, and with {longest} new ones is longer than the {limit} that "
                    "fit: shorten it, or lower max_new_tokens"
                )
        return Reward(self.name, self.function, self.columns, found)

    def examples(self, rows: Sequence[Row], longest: int) -> list[Encoded]:
        """Rows as token counts of the longest completions: what is known of batches before they are sampled."""
        return [Encoded((EncodedOption(self.ids[_name(row)] + (0,) * longest, longest),), (0,)) for row in rows]

    def completions(
        self, sampler: Sampler, tokenizer: Any, rows: Sequence[Row], key: Key, places: Sequence[int]
    ) -> list[Completed]:
        """Sample a completion of each row, and score them all in one call of the function.

        Raises:
            ValueError: the function gave another number of rewards, or one that is no finite number; the message names its row.
        """
        ids = sampler.sample([self.ids[_name(row)] for row in rows], key, places)
        texts = [str(tokenizer.decode(one, skip_special_tokens=True)) for one in ids]
        prompts = [row[PROMPT] for row in rows]
        answers = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in self.columns}
        rewards = self.checked(self.function(prompts=list(prompts), completions=answers, **columns), prompts)
        return [Completed(*one) for one in zip(prompts, texts, rewards, strict=True)]

    def checked(self, given: Any, prompts: Sequence[Any]) -> list[float]:
        """What the function returned, as a float for each prompt; errors as of :meth:`completions`."""
        rewards = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(rewards, str) or not isinstance(rewards, Sequence) or len(rewards) != len(prompts):
            count = f"{len(rewards)} rewards" if isinstance(rewards, Sequence) else f"a {type(rewards).__name__}"
            raise ValueError(f"reward {self.name!r} gave {count} for {len(prompts)} completions: return a list with one each")
        found = list[float]()
        for row, (value, prompt) in enumerate(zip(rewards, prompts, strict=True)):
            plain = value.item() if hasattr(value, "item") else value
            if not isinstance(plain, int | float) or not math.isfinite(plain):
                raise ValueError(
                    f"reward {self.name!r} gave {plain!r} for row {row} of the batch, with the prompt {_short(prompt)}: "
                    "return a finite number for every completion"
                )
            found.append(float(plain))
        return found

    def scores(
        self, sampler: Sampler, tokenizer: Any, rows: Sequence[Row], samples: int, seed: int, advance: Any = None
    ) -> RewardScores:
        """Mean reward of ``samples`` completions of each row, under the noise that all evaluations share."""
        drawn = [[row] * samples for row in rows]
        listed = [row for own in drawn for row in own]
        found = self.completions(sampler, tokenizer, listed, Key(seed, EVALUATION), range(len(listed)))
        if advance is not None:
            advance(len(rows))
        by_row = [found[start : start + samples] for start in range(0, len(found), samples)]
        rowwise = tuple(mean(one.reward for one in own) for own in by_row)
        value, answers = mean(rowwise), tuple(own[0].completion for own in by_row)
        return RewardScores(-value, REWARD, value, len(rows), {}, rowwise, answers, tuple(found))


@final
@dataclass(frozen=True)
class RewardLoss:
    """Minus the rewards of a batch, as a pure function of the model's weights and a key."""

    reward: Reward
    sampler: Sampler
    tokenizer: Any

    def __call__(self, rows: Sequence[Row], key: Key, places: Sequence[int]) -> torch.Tensor:
        """[b] float64: minus the reward of each row. Errors as of :meth:`Reward.completions`."""
        found = self.reward.completions(self.sampler, self.tokenizer, rows, key, places)
        return torch.tensor([-one.reward for one in found], dtype=torch.float64)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None where there is one alone."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _name(row: Row) -> str:
    return json.dumps(row[PROMPT], sort_keys=True)


def write_completions(target: Path, scores: RewardScores) -> Path:
    """Write a line of JSON for each completion: prompt, completion, reward."""
    lines = "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in scores.completed)
    return write_whole(target, lambda path: path.write_text(lines, encoding="utf-8"))


def reward_figures(folder: Path, samples: int) -> dict[str, dict[str, float | None]]:
    """``value`` and ``standard_error`` of the mean reward on dev at the ``start`` and at the ``end`` of a run, and of its
    ``rise``. Errors are over prompts; that of the rise is of the prompts' own rises, which share their noise. Empty where the
    completions of one end are gone.

    Args:
        samples: completions of each prompt.
    """
    sides: list[list[float]] = []
    for path in (folder / BEFORE, folder / AFTER):
        if not path.is_file():
            return {}
        rewards = [json.loads(line)["reward"] for line in path.read_text(encoding="utf-8").splitlines()]
        sides.append([mean(rewards[start : start + samples]) for start in range(0, len(rewards), samples)])
    if len(sides[0]) != len(sides[1]):
        return {}
    named = {"start": sides[0], "end": sides[1], "rise": [b - a for a, b in zip(*sides, strict=True)]}
    return {name: {"value": mean(own), "standard_error": standard_error(own)} for name, own in named.items()}
