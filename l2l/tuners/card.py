"""Results for a tuner's card, from what ``l2l meta-evaluate`` and ``l2l tuners test`` leave; and their words and tables.

The card of a tuner: what it is, how it was made, what it reached. Written from the tuner and its config alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from l2l.tuners.diagnostics import (
    TYPICAL_LOSS,
    TYPICAL_VARIANCE,
    basis_line,
    movement,
    sigma_by_kind,
    sigma_change,
    turns_line,
)
from l2l.tuners.model import Tuner

EVALUATION, TESTS = "evaluation", "tests"
"""Entries of a tuner's results that come from files; the others are those of its own training."""
BASELINE = "baseline-mezo"
"""The role of tuned MeZO."""
RESULTS_SHOWN = 3
"""Other figures that are told in a line."""

UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What JSON of another form leads to."""

Json = Mapping[str, Any]


def with_results(results: Json, file: Path, name: str, base_model: str, label: str | None = None) -> dict[str, Any]:
    """A tuner's results with those of a file: of an evaluation in place of an earlier one, of a test beside others.

    Args:
        file: ``meta_evaluate.json``, or the ``summary.json`` of a test.
        name: of the tuner's folder.
        label: what the evaluation calls it; None: the contender of that name, or the only one.

    Raises:
        ValueError: the file is neither, or says nothing of this tuner and model.
    """
    try:
        found = json.loads(file.read_text())
        if "by_tuner" in found:
            return {**results, EVALUATION: evaluation(found, file.name, name, base_model, label)}
        if "verdict" in found and "gain" in found:
            return {**results, TESTS: [*_others(results, found["config"]), tested(found, file.name)]}
    except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable as results ({error!r}): name a file that l2l wrote") from error
    raise ValueError(f"{file} holds no results: name meta_evaluate.json, or summary.json of `l2l tuners test`")


def evaluation(found: Json, file: str, name: str, base_model: str, label: str | None = None) -> dict[str, Any]:
    """What an evaluation says of a tuner on its own model: a row per task, and how sure the mean difference is.

    Raises:
        ValueError: it did not take part, or not on this model.
    """
    config = found["protocol"]["config"]
    chosen = label or _label(found, name)
    if chosen not in found["by_tuner"]:
        raise ValueError(f"{file} judges no tuner {chosen!r}: it has {', '.join(found['by_tuner'])}; choose by --label")
    settings = {setting["name"]: setting["model"] for setting in config["settings"]}
    own = [setting for setting, model in settings.items() if Path(model).name == Path(base_model).name]
    pairs = [pair for pair in found["pairs"][chosen] if pair["setting"] in own]
    if not pairs:
        raise ValueError(
            f"{file} has no results on {base_model!r}, only on {', '.join(sorted(set(settings.values())))}"
        )
    judged = _judgement(found, chosen, own, settings)
    mezo = next(one["label"] for one in config["contenders"] if one["role"] == BASELINE)
    return {
        "file": file,
        "passes": config["passes"],
        "seeds": config["seeds"],
        "tasks": [_row(pair, mezo, chosen) for pair in pairs],
        "interval": None if judged is None else judged["intervals"]["mean_loss_difference_to_mezo"],
        "controls": {} if judged is None else dict(judged["win_rate_over_each_control"]),
        "departures": list(found["departures"]),
    }


def _label(found: Json, name: str) -> str:
    """The contender that is this tuner."""
    contenders = found["protocol"]["config"]["contenders"]
    called = [one["label"] for one in contenders if one["tuner"] and Path(one["tuner"]).name == name]
    judged = called or list(found["by_tuner"])
    if len(judged) > 1:
        raise ValueError(f"which of the tuners is {name!r}? Choose one by --label: {', '.join(judged)}")
    return judged[0]


def _row(pair: Json, mezo: str, label: str) -> dict[str, Any]:
    return {
        "task": pair["task"],
        "loss_mezo": pair["mean_train_loss"][mezo],
        "loss": pair["mean_train_loss"][label],
        "accuracy_mezo": pair["mean_accuracy"][mezo],
        "accuracy": pair["mean_accuracy"][label],
    }


def _judgement(found: Json, label: str, own: Sequence[str], settings: Json) -> Json | None:
    """Rates and intervals, where the file has them for just these pairs."""
    if set(own) == set(settings):
        return found["by_tuner"][label]
    return found["by_setting"][own[0]] if len(own) == 1 and label == found["judged"] else None


def tested(found: Json, file: str) -> dict[str, Any]:
    """What a test says."""
    names = ("passes", "seeds", "gain", "interval", "seeds_gained", "verdict", "relation")
    about = {name: found["config"][name] for name in ("model", "task")}
    return {"file": file, **about, **{name: found[name] for name in names}}


def _others(results: Json, config: Json) -> list[Any]:
    """Tests on other models or tasks than this one."""
    return [one for one in results.get(TESTS, []) if (one["model"], one["task"]) != (config["model"], config["task"])]


def sections(results: Json) -> list[str]:
    """Paragraphs and tables in Markdown; empty where nothing came from a file, or something that reads otherwise."""
    try:
        return _sections(results)
    except UNREADABLE:
        return []


def _sections(results: Json) -> list[str]:
    found = results.get(EVALUATION)
    parts = [] if found is None else [_told(found), _table(found["tasks"])]
    if found is not None and found["controls"]:
        rates = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in found["controls"].items())
        parts.append(f"Share of tasks on which it ends below each control: {rates}.")
    if found is not None and found["departures"]:
        parts.append(f"Departures from the protocol: {'; '.join(found['departures'])}.")
    if results.get(TESTS):
        parts += ["Against sigma = 1 by `l2l tuners test`, at equal passes and with the same step control:"]
        parts += [_tests(results[TESTS])]
    return parts


def _told(found: Json) -> str:
    said = f"Beside MeZO by `l2l meta-evaluate`, {found['passes']} forward passes, means over {found['seeds']} seeds"
    return f"{said} (`{found['file']}`): {headline(found)}. Losses are those of training, in nats."


def brief(results: Json) -> str:
    """The most telling of a tuner's results in one line; empty where there are no figures."""
    try:
        return _brief_result(results)
    except UNREADABLE:
        return ""


def _brief_result(results: Json) -> str:
    if EVALUATION in results:
        return headline(results[EVALUATION])
    if TESTS in results:
        return "; ".join(f"{row['verdict']} on {row['task']} ({row['gain']:+.3f} nats)" for row in results[TESTS])
    if results.get("validation_loss_mezo") is not None:
        return f"validation loss {results['validation_loss']:.4g}, of MeZO {results['validation_loss_mezo']:.4g}"
    numbers = {name: value for name, value in results.items() if type(value) in (int, float)}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in list(numbers.items())[:RESULTS_SHOWN])


def headline(found: Json) -> str:
    """An evaluation in one clause."""
    tasks, between = found["tasks"], found["interval"]
    lower = sum(row["loss"] < row["loss_mezo"] for row in tasks)
    apart = sum(row["loss"] - row["loss_mezo"] for row in tasks) / len(tasks)
    sure = f" (95 % interval {between[0]:+.3f} to {between[1]:+.3f})" if between and None not in between else ""
    return f"loss below MeZO's on {lower} of {len(tasks)} tasks, {apart:+.3f} nats in the mean{sure}"


def _table(rows: Sequence[Json]) -> str:
    head = "| task | loss, MeZO | loss, tuner | accuracy, MeZO | accuracy, tuner |\n|---|--:|--:|--:|--:|"
    return "\n".join([head, *(_line(row) for row in rows)])


def _line(row: Json) -> str:
    shares = " | ".join(f"{100 * row[name]:.1f} %" for name in ("accuracy_mezo", "accuracy"))
    return f"| {row['task']} | {row['loss_mezo']:.3f} | {row['loss']:.3f} | {shares} |"


def _tests(rows: Sequence[Json]) -> str:
    lines = [
        "| model | task | passes | seeds | gain, nats | 95 % interval | verdict |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        size = f"{row['passes']} | {row['seeds']} | {row['gain']:+.4f} | {low:+.4f} to {high:+.4f}"
        lines.append(f"| {row['model']} | {row['task']} | {size} | {row['verdict']} |")
    return "\n".join(lines)


__all__ = ["movement", "render"]

LICENCE = re.compile(r"[\w.+-]+")
VALUES_SHOWN = 5
"""Blocks named, and the longest list that is written out."""


def render(tuner: Tuner, config: dict[str, Any]) -> str:
    """The card as Markdown, with the metadata header that the hub reads."""
    base = config["base_model"]
    sections = [
        _header(base, config["recipe"].get("licence")),
        f"Sets the perturbation scale (sigma) of each of the {len(tuner.fingerprint.names)} blocks of `{base}` in "
        f"zeroth-order fine-tuning.{_reach(tuner)}",
        _example(base),
        f"Architecture `{config['architecture']}` {_brief(config['architecture_args'])}, features "
        f"`{config['features']}`, normaliser {_brief(config['normaliser'])}. Basis: {basis_line(tuner)}. "
        f"Turns: {turns_line(tuner)}.",
        *_state(tuner),
        "## Recipe",
        _json(config["recipe"]),
        "## Results",
        *_results(config["results"]),
        f"Made with {', '.join(f'{name} {number}' for name, number in config['versions'].items())}.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(results: dict[str, Any]) -> list[str]:
    """Tables of what was found since, then what its own training found."""
    tables = sections(results)
    if not results:
        return ["None are recorded."]
    own = {name: value for name, value in results.items() if not tables or name not in (EVALUATION, TESTS)}
    return [
        *tables,
        *(["In its own training:"] if tables and own else []),
        *([_json(own)] if own or not tables else []),
    ]


def _header(base: str, licence: object) -> str:
    metadata = ["library_name: l2l", f"base_model: {base}", "tags: [zeroth-order, learned-optimizer, l2l]"]
    if isinstance(licence, str) and LICENCE.fullmatch(licence):  # the hub takes names, no sentences
        metadata.append(f"license: {licence.lower()}")
    return "\n".join(["---", *metadata, "---", f"# Tuner for {base}"])


def _example(base: str) -> str:
    lines = [
        "```python",
        "import l2l",
        "",
        f'model = l2l.load_model("{base}")',
        'tuner = l2l.Tuner.from_pretrained("this directory or its hub id")',
        "optimizer = l2l.ZOFineTuner(model, tuner)",
        "```",
    ]
    return "\n".join(lines)


def _reach(tuner: Tuner) -> str:
    return " Nothing in it belongs to a block: it serves models of other sizes and families." if tuner.size_free else ""


def _state(tuner: Tuner) -> list[str]:
    """How far it moved, and its sigma."""
    moved, changes = movement(tuner), sigma_change(tuner)
    head = "| kind | blocks | min | median | max | CV |\n|---|--:|--:|--:|--:|--:|"
    kinds = "" if tuner.fingerprint.kinds else " (kinds by shape alone: embeddings count as matrices)"
    rows = [
        f"| {row.kind} | {row.blocks} | {row.smallest:.4g} | {row.median:.4g} | {row.largest:.4g} | {row.variation:.3f} |"
        for row in sigma_by_kind(tuner)
    ]
    return [
        f"Distance from its initialisation, relative: {_spread(moved, tuner, '.4f')}.",
        f"Change of sigma since, relative: {_spread(changes, tuner, '+.4f')}.",
        f"Sigma before normalisation, at weights of mean 0 and variance {TYPICAL_VARIANCE:g}, losses of "
        f"{TYPICAL_LOSS:g} and a last sigma of 1{kinds}:",
        "\n".join([head, *rows]),
    ]


def _spread(values: list[float], tuner: Tuner, form: str) -> str:
    if not values:
        return "unknown"
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:VALUES_SHOWN]
    largest = ", ".join(f"`{tuner.fingerprint.names[i]}` {values[i]:{form}}" for i in order)
    return f"median {median(values):{form}}, largest {largest}"


def _brief(values: dict[str, Any]) -> str:
    """JSON in one line; of long lists and tables, how many entries they have."""
    long = {
        name: value for name, value in values.items() if isinstance(value, list | dict) and len(value) > VALUES_SHOWN
    }
    return json.dumps(values | {name: f"{len(value)} values" for name, value in long.items()})


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=1)}\n```"
