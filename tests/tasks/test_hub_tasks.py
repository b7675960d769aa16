"""Every task on a data set of the hub renders a row to the exact text it promises, and works on real rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2l.models.batching import Grouping
from l2l.tasks import get_task, task_names
from l2l.tasks.base import Example, HubData, Row, Task, render
from l2l.tasks.encode import encode
from l2l.tasks.evaluate import evaluate
from l2l.tasks.rows import load_rows

HUB = [name for name in task_names() if isinstance(get_task(name).source, HubData)]

CASES = {
    "sst2": (
        {"sentence": "a fine film . ", "label": 1},
        Example("a fine film . It was", (" terrible", " great"), (1,)),
    ),
    "sst5": (
        {"text": "a fine film .", "label": 3},
        Example("a fine film . It was", (" terrible", " bad", " okay", " good", " great"), (3,)),
    ),
    "rte": (
        {"premise": "Cats sleep.", "hypothesis": "Animals rest.", "label": 0},
        Example('Cats sleep.\nGiven this text, is it true that "Animals rest."? Answer Yes or No.\n', ("Yes", "No"), (0,)),
    ),
    "cb": (
        {"premise": "it may rain.", "hypothesis": "it rains", "label": 2},
        Example(
            'Suppose it may rain.\nDoes it follow that "it rains"? Answer Yes, No or Maybe.\n',
            ("Yes", "No", "Maybe"),
            (2,),
        ),
    ),
    "boolq": (
        {"passage": "Water boils.", "question": "is water hot", "label": 1},
        Example("Water boils. Is water hot?\n", ("No", "Yes"), (1,)),
    ),
    "copa": (
        {
            "premise": "The man fell.",
            "choice1": "I'd pushed.",
            "choice2": "He was ill.",
            "question": "cause",
            "label": 1,
        },
        Example("The man fell because", (" I'd pushed.", " he was ill."), (1,)),
    ),
    "trec": (
        {"text": "Where is Lima ?", "coarse_label": 4},
        Example(
            "Where is Lima ?\nType of answer:",
            (" Abbreviation", " Entity", " Description", " Person", " Location", " Number"),
            (4,),
        ),
    ),
    "ag_news": (
        {"text": "Stocks rise.", "label": 2},
        Example("Stocks rise.\nTopic:", (" World", " Sports", " Business", " Technology"), (2,)),
    ),
    "squad": (
        {"title": "Peru", "context": "Lima is big.", "question": "What is big?", "answers": {"text": ["Lima", "lima"]}},
        Example("Title: Peru\nContext: Lima is big.\nQuestion: What is big?\nAnswer:", (" Lima\n",), (0,), ("Lima", "lima")),
    ),
    "snli": (
        {"premise": "A man surfs. ", "hypothesis": "A man is wet.", "label": 1},
        Example(
            'A man surfs.\nDoes it follow that "A man is wet."? Answer Yes, Maybe or No.\n',
            ("Yes", "Maybe", "No"),
            (1,),
        ),
    ),
    "mnli": (
        {"premise": "yeah i know", "hypothesis": "I did not know. ", "label": 2},
        Example(
            'yeah i know\nDoes it follow that "I did not know."? Answer Yes, Maybe or No.\n',
            ("Yes", "Maybe", "No"),
            (2,),
        ),
    ),
    "wic": (
        {"word": "hold", "sentence1": "Hold a table.", "sentence2": "I hold a hand.", "label": 0},
        Example(
            'Is "hold" used in the same sense in both sentences? Answer Yes or No.\nHold a table.\nI hold a hand.\n',
            ("No", "Yes"),
            (0,),
        ),
    ),
    "wsc": (
        {"text": "Ann saw Eve . She waved.", "span1_text": "Eve", "span2_text": "She", "label": 1},
        Example(
            'Ann saw Eve . She waved.\nIn this text, does "she" stand for "Eve"? Answer Yes or No.\n',
            ("No", "Yes"),
            (1,),
        ),
    ),
    "multirc": (
        {"paragraph": "Lima is big. ", "question": "What is big?", "answer": "Lima", "label": 1},
        Example('Lima is big.\nQuestion: What is big?\nIs "Lima" a right answer? Answer Yes or No.\n', ("No", "Yes"), (1,)),
    ),
    "record": (
        {
            "passage": "Ann met Bill Gates.\n@highlight\nAnn was late\n@highlight\nGates left",
            "query": "It was @placeholder who left.",
            "entities": ["Ann", "Bill Gates", "Gates"],
            "answers": ["Gates", "Bill Gates", "Gates"],
        },
        Example(
            "Ann met Bill Gates.\n- Ann was late\n- Gates left\n-",
            (" It was Ann who left.", " It was Bill Gates who left.", " It was Gates who left."),
            (2, 1),
        ),
    ),
    "drop": (
        {
            "passage": "They scored 3 and 4. ",
            "question": "How many in all?",
            "answers_spans": {"spans": [" 7", "7", "seven"], "types": ["number", "number", "span"]},
        },
        Example("Passage: They scored 3 and 4.\nQuestion: How many in all?\nAnswer:", (" 7\n",), (0,), ("7", "seven")),
    ),
    "winogrande": (
        {"sentence": "Ann phoned Eve when _ was lost.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        Example("Ann phoned Eve when", (" Ann was lost.", " Eve was lost."), (1,)),
    ),
    "mr": (
        {"text": "a fine film . ", "label": 1},
        Example("a fine film . It was", (" terrible", " great"), (1,)),
    ),
    "cr": (
        {"text": "it broke .", "label": 0},
        Example("it broke . It was", (" terrible", " great"), (0,)),
    ),
    "subj": (
        {"text": "a moving tale .", "label": 1},
        Example("a moving tale . This is", (" objective", " subjective"), (1,)),
    ),
}

EMPTY = {
    "sst2": "a fine film .",
    "sst5": "a fine film .",
    "mr": "a fine film .",
    "cr": "it broke .",
    "subj": "a moving tale .",
    "trec": "Where is Lima ?",
    "ag_news": "Stocks rise.",
    "rte": "Cats sleep.\nAnimals rest.\n",
    "cb": "it may rain.\nit rains\n",
    "snli": "A man surfs.\nA man is wet.\n",
    "mnli": "yeah i know\nI did not know.\n",
    "copa": "The man fell.",
}
"""Task -> the prompt of its variant ``empty`` for its row in `CASES`."""

LM = {"copa", "record", "winogrande", "squad", "drop"}
"""Tasks that are trained on the tokens of the right option."""


def test_every_task_on_the_hub_has_a_case():
    assert set(CASES) == set(HUB)


@pytest.mark.parametrize("name", CASES)
def test_a_task_renders_its_row_to_the_promised_text(name):
    row, expected = CASES[name]
    task = get_task(name)
    assert render(task, row, "row 0") == expected
    assert task.form == ("lm" if name in LM else "classification")
    assert task.metric == ("f1" if expected.answers else "accuracy")


@pytest.mark.parametrize("name", CASES)
def test_every_field_a_task_lists_is_needed(name):
    row, _ = CASES[name]
    task = get_task(name)
    for field in task.fields:
        with pytest.raises(ValueError, match=f"here: field '{field}' is missing"):
            render(task, {key: value for key, value in row.items() if key != field}, "here")


@pytest.mark.parametrize("name", EMPTY)
def test_the_empty_prompt_is_the_bare_input_with_the_same_gold_and_options(name):
    row, usual = CASES[name]
    empty = get_task(f"{name}:empty").example(row)
    assert empty.prompt == EMPTY[name]
    assert empty.gold == usual.gold
    # COPA's alternatives are sentences of their own there, no longer the rest of one.
    assert empty.options == (usual.options if name != "copa" else (" I'd pushed.", " He was ill."))


def test_the_tasks_with_an_empty_prompt_are_these():
    assert {name for name in task_names() if "empty" in get_task(name).variants} == set(EMPTY)


def test_a_variant_keeps_rows_metric_and_version_and_says_which_it_is():
    usual, empty = get_task("rte"), get_task("rte@1:empty")
    assert (empty.name, empty.source, empty.metric, empty.version) == ("rte", usual.source, usual.metric, 1)
    assert (usual.label, empty.label) == ("rte@1", "rte@1:empty")
    assert empty.contextless is None


def test_boolq_keeps_a_question_mark_that_is_there():
    row = {"passage": "P.", "question": "is it so?", "label": 0}
    assert get_task("boolq").example(row).prompt == "P. Is it so?\n"


def test_copa_continues_an_effect_with_so():
    row = {"premise": "It rained", "choice1": "I ran.", "choice2": "We ran.", "question": "effect", "label": 0}
    assert get_task("copa").example(row) == Example("It rained so", (" I ran.", " we ran."), (0,))


def test_wsc_asks_for_a_noun_on_one_line():
    row = {"text": "A b is it.", "span1_text": "A\nb", "span2_text": "it", "label": 1}
    assert get_task("wsc").example(row).prompt.splitlines()[1].startswith('In this text, does "it" stand for "A b"?')


@pytest.mark.parametrize("name", ["snli", "mnli"])
def test_the_middle_label_of_the_three_way_pairs_is_the_open_one_unlike_cb(name):
    row = {"premise": "P.", "hypothesis": "H.", "label": 0}
    answers = [task.example(row).options for task in (get_task(name), get_task("cb"))]
    assert answers == [("Yes", "Maybe", "No"), ("Yes", "No", "Maybe")]


def test_a_sentence_that_begins_with_the_blank_gives_options_without_a_space():
    row = {"sentence": "_ was lost.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    assert get_task("winogrande").example(row) == Example("", ("Ann was lost.", "Eve was lost."), (0,))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": -1}, r"field 'label' must be a whole number in 0..1, not -1"),
        ("sst2", {"label": "1"}, r"field 'label' must be a whole number"),
        ("sst2", {"label": None}, r"field 'label' is null"),
        ("sst2", {"sentence": 3}, r"field 'sentence' must be a string, not 3"),
        ("copa", {"question": "why"}, r"field 'question' must be 'cause' or 'effect', not 'why'"),
        ("copa", {"choice1": "  "}, r"cannot render"),
        ("snli", {"label": -1}, r"field 'label' must be a whole number in 0..2, not -1"),
        ("wsc", {"span1_text": 4}, r"field 'span1_text' must be a string, not 4"),
        ("squad", {"answers": {"text": []}}, r"'answers' holds no answer text"),
        ("squad", {"answers": {}}, r"cannot render this row: 'text'"),
        ("record", {"query": "It was Ann."}, "field 'query' must hold '@placeholder'"),
        ("record", {"answers": ["Eve"]}, r"field 'answers' must name at least one of the entities .* not \['Eve'\]"),
        ("record", {"answers": []}, r"field 'answers' must name at least one of the entities .* not \[\]"),
        ("drop", {"answers_spans": {"spans": ["  "]}}, "field 'answers_spans' holds no span"),
        ("drop", {"answers_spans": {}}, "cannot render this row: 'spans'"),
        ("winogrande", {"answer": ""}, "field 'answer' must be '1' or '2', not ''"),
        ("winogrande", {"answer": 1}, "field 'answer' must be '1' or '2', not 1"),
        ("winogrande", {"sentence": "No blank."}, "field 'sentence' must hold one blank '_'"),
        ("winogrande", {"sentence": "_ or _."}, "field 'sentence' must hold one blank '_'"),
        ("subj", {"label": 2}, r"field 'label' must be a whole number in 0..1, not 2"),
    ],
)
def test_a_bad_value_names_the_place_and_the_field(name, change, message):
    row, _ = CASES[name]
    with pytest.raises(ValueError, match=r"^file.jsonl:7: .*" + message):
        render(get_task(name), row | change, "file.jsonl:7")


ROWS = 12
LIMIT = 2048

HAND_WRITTEN: dict[str, list[dict[str, Any]]] = {
    "winogrande": [
        {"sentence": sentence, "option1": "Ann", "option2": "Eve", "answer": answer}
        for sentence, answer in (
            ("Ann phoned Eve after _ found the key.", "1"),
            ("Ann was cross with Eve because _ lost it.", "2"),
        )
    ],
} | {name: [{"text": f"sentence {i} .", "label": i % 2} for i in range(4)] for name in ("mr", "cr", "subj")}
"""Rows in the hub's form, of tasks whose data are not among the shared ones."""


class Oracle(nn.Module):
    """Puts nearly all probability on the next token of texts that it was told, and none on what it was not."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.config, self.device = words, SimpleNamespace(), torch.device("cpu")
        self.after: dict[tuple[int, ...], int] = {}
        self.says: dict[tuple[int, ...], list[int]] = {}

    def learn(self, ids: tuple[int, ...], length: int) -> None:
        """Expect the last ``length`` ids after those before them."""
        for place in range(len(ids) - length, len(ids)):
            self.after[ids[:place]] = ids[place]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, self.words)
        lengths = {len(known) for known in self.after}
        for row, ids in enumerate(input_ids.tolist()):
            for length in lengths:
                following = self.after.get(tuple(ids[:length]))
                if following is not None and length <= len(ids):
                    logits[row, length - 1, following] = 20.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        told = [self.says[tuple(ids[mask.bool()].tolist())] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        longest = max(map(len, told))
        padded = [ids + [generation_config.pad_token_id] * (longest - len(ids)) for ids in told]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


def rows_of(task: Task, shared, tokenizer) -> list[Row]:
    """Real rows, whole within the limit, no prompt twice; hand-written ones where there are no data."""
    if task.name in HAND_WRITTEN:
        return list(HAND_WRITTEN[task.name])
    rows: dict[str, Row] = {}
    for row in load_rows(task, "validation", shared / "data", 60):
        prompt = task.example(row).prompt
        if len(tokenizer(prompt)["input_ids"]) < LIMIT - 200:
            rows[prompt] = row
    return list(rows.values())[:ROWS]


def oracle(task: Task, rows: list[Row], tokenizer) -> Any:
    model = Oracle(len(tokenizer))
    for row, example in zip(rows, encode(task, rows, tokenizer, LIMIT), strict=True):
        gold = example.options[example.gold[0]]
        model.learn(gold.ids, gold.length)
        rendered = task.example(row)
        said = tokenizer(rendered.prompt + rendered.options[example.gold[0]])["input_ids"]
        prompt = tokenizer(rendered.prompt)["input_ids"]
        model.says[tuple(prompt)] = said[len(prompt) :]
    return model


@pytest.mark.parametrize("name", HUB)
def test_a_model_that_prefers_the_gold_option_is_always_right(name, shared, stories):
    tokenizer = stories[1]
    task = get_task(name)
    rows = rows_of(task, shared, tokenizer)
    assert len(rows) == (len(HAND_WRITTEN[name]) if name in HAND_WRITTEN else ROWS)
    scores = evaluate(oracle(task, rows, tokenizer), tokenizer, task, rows, 4, grouping=Grouping())
    assert scores.value == 1.0
    assert scores.loss < 0.5
    assert all(value == 1.0 for value in scores.official.values())


@pytest.mark.parametrize("name", HUB)
def test_options_differ_as_tokens_and_the_gold_one_can_be_read_off_the_row(name, shared, stories):
    task = get_task(name)
    rows = rows_of(task, shared, stories[1])
    for row, encoded in zip(rows, encode(task, rows, stories[1], LIMIT), strict=True):
        example = task.example(row)
        assert len({option.ids for option in encoded.options}) == len(example.options)
        assert encoded.gold == example.gold
        if "label" in row and task.name != "copa":
            assert example.gold == (row["label"],)
        if task.metric == "f1":
            assert example.options[0].strip() in [answer.strip() for answer in example.answers]


def test_the_benchmarks_own_metrics_are_filled_where_a_task_has_them(shared, stories):
    named = {}
    for name in HUB:
        task = get_task(name)
        if task.official is not None:
            rows = load_rows(task, "validation", shared / "data", 5)
            named[name] = set(task.official(rows, [task.example(row).options[0] for row in rows]))
    assert named == {
        "multirc": {"f1a", "exact_match"},
        "squad": {"exact_match"},
        "drop": {"f1", "exact_match"},
        "record": {"f1", "exact_match"},
    }


@pytest.mark.parametrize("name", [name for name in HUB if name not in HAND_WRITTEN])
def test_every_row_of_the_real_data_renders(name, shared):
    for split in ("train", "validation"):
        assert len(load_rows(get_task(name), split, shared / "data")) > 30


PAIRED = ["snli", "mnli", "wic", "wsc", "multirc"]


def encodes_to_options_that_differ(name: str, rows: list[Row], tokenizer: Any) -> None:
    for row, example in zip(rows, encode(get_task(name), rows, tokenizer, 256), strict=True):
        assert example.gold == (row["label"],)
        assert max(len(option.ids) for option in example.options) <= 256
        assert len({option.ids[-option.length :] for option in example.options}) == len(example.options)


@pytest.mark.parametrize("name", PAIRED)
def test_a_slice_of_the_real_data_encodes_to_options_that_differ(name, shared, stories, todays_seed):
    rows = load_rows(get_task(name), "train", shared / "data", 100, todays_seed)
    encodes_to_options_that_differ(name, rows, stories[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRED)
def test_every_row_of_the_real_data_encodes_to_options_that_differ(name, shared, stories):
    for split in ("train", "validation"):
        encodes_to_options_that_differ(name, load_rows(get_task(name), split, shared / "data"), stories[1])
