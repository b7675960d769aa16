"""`l2l init`: odd tables become tasks that load, guesses are right or said to be open, and nothing is written over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from l2l import cli
from l2l.costs import gib
from l2l.tasks import get_task
from l2l.tasks.inspect import CheckConfig, check
from l2l.tasks.rows import load_rows
from l2l.tools.init import Guess, InitConfig, config_text, guess, prompt_of, read_frame, run_init, suggest
from l2l.train.config import FineTuneConfig

N = 20


def lines(row: Callable[[int], str], head: str) -> str:
    return "\n".join([head, *map(row, range(N))]) + "\n"


def said(n: int) -> str:
    return f"lily {'lost' if n % 2 else 'found'} her ball number {n} ."


def mood(n: int) -> str:
    return "sad" if n % 2 else "happy"


@dataclasses.dataclass(frozen=True)
class Odd:
    """A table, and what is to be made of it."""

    content: bytes | str
    texts: tuple[str, ...] = ("text",)
    label: str = "mood"
    labels: tuple[str, ...] = ("happy", "sad")
    rows: int = N
    kept: bool = False
    """Whether the task reads the table itself."""
    note: str = ""
    options: str = ""


PLAIN = lines(lambda n: f"{said(n)},{mood(n)}", "text,mood")
CSVS = {
    "plain": Odd(PLAIN, kept=True),
    "semicolons of a spreadsheet": Odd(PLAIN.replace(",", ";"), note="separated by ';'"),
    "a byte order mark and carriage returns": Odd(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(), kept=True),
    "UTF-16": Odd(PLAIN.encode("utf-16"), note="UTF-16"),
    "Windows-1252": Odd(PLAIN.replace("ball", "caf\u00e9 \u201cball\u201d").encode("cp1252"), note="Windows-1252"),
    "line breaks, separators and quotes in texts": Odd(
        lines(lambda n: f'"lily said ""no"",\n{said(n)}",{mood(n)}', "text,mood"), kept=True
    ),
    "an index without a name, a score, and a number as label": Odd(
        lines(lambda n: f"{n},{said(n)},{n * 0.37},{n % 3}", ",Review Text,score,class"),
        ("Review_Text",), "class_", ("0", "1", "2"), note="'class' is class_",
    ),
    "no names of columns": Odd(
        lines(lambda n: f"{said(n)},{mood(n)}", "tom ran home .,happy"), ("column_1",), "column_2", rows=N + 1, note="no names",
    ),
    "two texts, as of entailment, behind tabs": Odd(
        lines(lambda n: f"{said(n)}\tthe ball is number {n} .\tentailment{n % 2}", "premise\thypothesis\tgold"),
        ("premise", "hypothesis"), "gold", ("entailment0", "entailment1"), note="separated by",
    ),
    "empty lines, a short row, and a row without a label": Odd(
        PLAIN + "\n , \nonly one cell\n\"tom sat .\",\n", note="1 rows lack a value", rows=N,
    ),
    "white space around values, and two columns of one name": Odd(
        lines(lambda n: f"x, {said(n)} , {mood(n)} ", "text,text,mood"), ("column_2",), note="written anew",
    ),
    "answers to be written": Odd(
        lines(lambda n: f"what is {n} and {n + 1} ?,it is {2 * n + 1} of course", "question,answer"),
        ("question",), "answer", (), kept=True,
    ),
}  # fmt: skip
RECORDS: list[dict[str, Any]] = [{"text": said(n), "mood": mood(n)} for n in range(N)]
OWN = [{"question": f"where is {said(n)}", "choices": ["here", "there", f"at {n}"], "answer": n % 3} for n in range(N)]
JSONS = {
    "an array": Odd(json.dumps(RECORDS), kept=True),
    "an object that holds one": Odd(json.dumps({"version": 1, "data": RECORDS})),
    "columns": Odd(json.dumps({name: [row[name] for row in RECORDS] for name in ("text", "mood")})),
    "lines under the wrong suffix": Odd("\n".join(map(json.dumps, RECORDS)), kept=True),
    "booleans": Odd(json.dumps([{**row, "mood": row["mood"] == "sad"} for row in RECORDS]), labels=("False", "True")),
    "nulls and whole floats": Odd(
        json.dumps([{"text": said(n), "mood": float(n % 2) if n else None} for n in range(N)]), rows=N - 1, labels=("1", "0")
    ),
    "options of each row": Odd(json.dumps(OWN), ("question",), "answer", (), options="choices"),
}


def made(odd: Odd, suffix: str) -> Path:
    path = Path(f"table{suffix}")
    path.write_bytes(odd.content if isinstance(odd.content, bytes) else odd.content.encode())
    return path


ODD = [(".csv", name, odd) for name, odd in CSVS.items()] + [(".json", name, odd) for name, odd in JSONS.items()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("suffix", "name", "odd"), ODD, ids=[f"{suffix} {name}" for suffix, name, _ in ODD])
def test_an_odd_table_becomes_a_task(suffix, name, odd, here):
    table = made(odd, suffix)
    before = table.read_bytes()
    written = run_init(InitConfig(str(table)))
    found = written.guess
    assert (found.texts, found.label, found.labels, found.options) == (odd.texts, odd.label, odd.labels, odd.options)
    assert (written.rows == table) is odd.kept
    assert odd.note in " ".join(written.notes)
    assert table.read_bytes() == before
    task = get_task(str(written.task))
    splits = [load_rows(task, split, None, 1000, 0) for split in ("train", "validation")]
    assert sum(map(len, splits)) == odd.rows
    example = task.example(splits[0][0])
    assert str(splits[0][0][odd.texts[0]]) in example.prompt
    assert len(example.options) == (1 if found.generates else 3 if odd.options else len(odd.labels))
    given = yaml.safe_load(written.config.read_text())
    FineTuneConfig(**given).completed()


def test_the_files_say_what_was_guessed_and_a_first_run_takes_them(here, capsys):
    made(CSVS["semicolons of a spreadsheet"], ".csv")
    assert cli.main(["init", "table.csv", "--name", "moods"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("prompt: text; the right option: mood\nOf the table: its cells are separated by ';'.\n")
    assert told.count("‖ *") == 3, "three rendered examples with their right option"
    assert "right in train" in told
    assert told.endswith("next: l2l fine-tune --config moods-fine-tune.yaml\n")
    assert sorted(path.name for path in here.iterdir()) == ["moods-fine-tune.yaml", "moods.jsonl", "moods.yaml", "table.csv"]
    command = next(line for line in Path("moods-fine-tune.yaml").read_text().splitlines() if line.startswith("# l2l"))
    small = ["--max_passes", "20", "--batch_size", "2", "--num_directions", "2", "--progress", "false", "--save", "log"]
    assert cli.main([*command.removeprefix("# l2l ").split(), *small]) == 0
    assert Path("runs/moods/summary.json").is_file()


def test_files_may_lie_in_another_folder_than_the_table(here):
    Path("data").mkdir()
    Path("data/moods.csv").write_text(PLAIN)
    written = run_init(InitConfig("data/moods.csv", out="tasks"))
    assert (written.task, written.rows) == (Path("tasks/moods.yaml"), Path("data/moods.csv"))
    assert check(CheckConfig(str(written.task))).facts["train rows"] == N * 4 // 5


def test_nothing_is_written_over(here):
    Path("moods.csv").write_text(PLAIN)
    run_init(InitConfig("moods.csv"))
    Path("moods.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"moods\.yaml is there already: give another --name, or --overwrite true"):
        run_init(InitConfig("moods.csv"))
    assert Path("moods.yaml").read_text() == "mine"
    run_init(InitConfig("moods.csv", name="others"))
    run_init(InitConfig("moods.csv", overwrite=True))
    assert Path("moods.yaml").read_text() != "mine"
    Path("odd.jsonl").write_text("".join(json.dumps({**row, "a b": 1, "mood": row["mood"] + " "}) + "\n" for row in RECORDS))
    with pytest.raises(ValueError, match=r"odd\.jsonl is there already: give another --name; see"):
        run_init(InitConfig("odd.jsonl", overwrite=True))
    assert run_init(InitConfig("odd.jsonl", name="even")).rows == Path("even.jsonl")


WRONG: dict[str, tuple[str, str | bytes, dict[str, Any]]] = {
    "are not read: save the table as one of": ("a.xlsx", b"PK", {}),
    "files without a suffix are not read": ("table", PLAIN, {}),
    "holds binary data": ("a.csv", b"a,b\0\n", {}),
    "holds no rows": ("a.csv", "", {}),
    "holds no rows; see": ("a.csv", "text,mood\n,\n", {}),
    "has one column": ("a.csv", "text\nlily ran .\n", {}),
    "3 of 4 rows have not the 2 cells": ("a.csv", "a,b\n1,2\n1,2,3\n1,2,3\n1,2,3\n", {}),
    "a.json:1: neither JSON nor JSON lines": ("a.json", "{text: 1}", {}),
    "must hold objects": ("a.json", "[1, 2]", {}),
    "there is no column 'moods': name one of text, mood": ("a.csv", PLAIN, {"label": "moods"}),
    "there is no column 'txt': name one of text, mood": ("a.csv", PLAIN, {"text": ["txt"]}),
    "no column looks like a label": ("a.csv", lines(lambda n: f"{said(n)},{n}", "text,id"), {}),
    "no column beside 'mood' looks like a text": ("a.csv", lines(lambda n: f"{n},{mood(n)}", "id,mood"), {}),
    "10 of 20 rows lack a value, in mood (10)": (
        "a.csv", lines(lambda n: f"{said(n)},{mood(n // 2) if n % 2 else ''}", "text,mood"), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("said_", WRONG)
def test_what_cannot_be_read_or_guessed_is_one_line_that_names_a_page(said_, here, capsys):
    name, content, options = WRONG[said_]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [f"--{option}={value if isinstance(value, str) else json.dumps(value)}" for option, value in options.items()]
    assert cli.main(["init", name, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said_.replace("; see", "") in line
    assert line.endswith("see docs/your-task.md")
    assert [path.name for path in here.iterdir()] == [name]


def test_a_table_that_is_not_there_is_named(here):
    with pytest.raises(FileNotFoundError, match=r"no file 'gone\.csv'"):
        run_init(InitConfig("gone.csv"))


def test_columns_that_are_named_are_taken(here):
    Path("a.csv").write_text(lines(lambda n: f"{said(n)},ben ran {n} miles .,{mood(n)},{n % 4}", "text,more,mood,stars"))
    frame = read_frame(Path("a.csv"))
    assert guess(frame).label == "mood", "words say more than numbers"
    assert guess(frame).others == ("stars",)
    found = guess(frame, ["more"], "stars")
    assert (found.texts, found.label, found.labels) == (("more",), "stars", ("0", "1", "2", "3"))
    assert prompt_of(found) == "{{ more }}\nStars:"
    assert prompt_of(guess(frame)) == "Text: {{ text }}\nMore: {{ more }}\nMood:"


def test_a_run_is_suggested_by_memory():
    found, gibibyte = Guess(("text",), "mood", ("happy", "sad")), 2**30
    sizes = (8 * gibibyte, gibibyte, gibibyte // 4)
    much, some, none = (suggest("smollm2-135m-shape", found, 128, 1500, room) for room in sizes)
    assert (much.options["scheme"], much.options["train_layers"], much.options["num_directions"]) == ("full", "top:5", 16)
    assert gib(much.peak_bytes) in much.why["scheme"]
    assert "k = 5 of 30 layers" in much.why["train_layers"]
    assert (some.fits, some.options["scheme"], some.options["train_layers"]) == (True, "full", "all")
    assert some.peak_bytes <= 0.8 * gibibyte < much.peak_bytes
    assert not none.fits
    assert (none.options["scheme"], none.options["batch_size"], none.options["num_directions"]) == ("lora", 4, 4)
    assert "does not fit" in config_text("l2l fine-tune", "a/model", Path("a.yaml"), "a", none)
    answers = suggest("smollm2-135m-shape", Guess(("question",), "answer"), 128, 1500, sizes[0])
    assert (answers.options["method"], answers.options["lr"]) == ("mezo", "auto")
    small = suggest("l2l/tiny", found, 10_000, 1500, sizes[0])  # rows are cut to the positions of the model
    assert small.options["train_layers"] == "all"
