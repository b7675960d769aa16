"""The card of a tuner, ``README.md``: what it is, how it was made, its results. Written from the tuner and its config alone.

Results come from the tuner's own training, and from the files of ``l2l meta-evaluate`` and ``l2l tuners test``.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from l2l.tuners import diagnostics
from l2l.tuners.model import TunerModel
from l2l.tuners.plan import plan_line

Json: TypeAlias = Mapping[str, Any]

EVALUATION, TESTS = "evaluation", "tests"
"""Entries of a tuner's results that come from files; the others are those of its own training."""
BASELINE = "baseline-mezo"
"""The role of tuned MeZO in an evaluation."""
UNKNOWN = "unknown"
"""How a licence begins that nobody stated."""
LICENCE = re.compile(r"[\w.+-]+")
RESULTS_SHOWN = 3
"""Figures of its own training in the line of :func:`brief`."""
VALUES_SHOWN = 5
"""Blocks named, and the longest list that is written out."""
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""Raised at JSON of another structure."""


def with_results(results: Json, file: Path, name: str, base_model: str, label: str | None = None) -> dict[str, Any]:
    """A tuner's results with those of a file: an evaluation replaces an earlier one, a test is added to others.

    Args:
        file: ``meta_evaluate.json``, or the ``summary.json`` of a test; else ValueError.
        name: of the tuner's folder.
        label: the tuner's label in the evaluation; None: the contender of that name, or the only one.
    """
    try:
        found = json.loads(file.read_text())
        if "by_tuner" in found:
            return {**results, EVALUATION: _evaluation(found, file.name, name, base_model, label)}
        if "verdict" in found and "gain" in found:
            names = ("passes", "seeds", "gain", "interval", "seeds_gained", "verdict", "relation")
            about = {key: found["config"][key] for key in ("model", "task")}
            row = {"file": file.name, **about, **{key: found[key] for key in names}}
            others = [one for one in results.get(TESTS, []) if any(one[key] != row[key] for key in about)]
            return {**results, TESTS: [*others, row]}
    except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not readable as results ({error!r}): name a file that l2l wrote") from error
    raise ValueError(f"{file} holds no results: name meta_evaluate.json, or summary.json of `l2l tuners test`")


def _evaluation(found: Json, file: str, name: str, base_model: str, label: str | None) -> dict[str, Any]:
    """An evaluation's results of a tuner on its own model: a row per task, and the interval of the mean difference."""
    config = found["protocol"]["config"]
    called = [one["label"] for one in config["contenders"] if one["tuner"] and Path(one["tuner"]).name == name]
    judged = [label] if label is not None else called or list(found["by_tuner"])
    if len(judged) > 1:
        raise ValueError(f"which of the tuners is {name!r}? Choose one by --label: {', '.join(judged)}")
    label = judged[0]
    if label not in found["by_tuner"]:
        raise ValueError(f"{file} judges no tuner {label!r}: it has {', '.join(found['by_tuner'])}; choose by --label")
    settings = {setting["name"]: setting["model"] for setting in config["settings"]}
    own = [setting for setting, model in settings.items() if Path(model).name == Path(base_model).name]
    pairs = [pair for pair in found["pairs"][label] if pair["setting"] in own]
    if not pairs:
        raise ValueError(f"{file} has no results on {base_model!r}, only on {', '.join(sorted(set(settings.values())))}")
    judgement = None  # rates and intervals are there for all settings, or for one setting of the judged tuner
    if set(own) == set(settings):
        judgement = found["by_tuner"][label]
    elif len(own) == 1 and label == found["judged"]:
        judgement = found["by_setting"][own[0]]
    mezo = next(one["label"] for one in config["contenders"] if one["role"] == BASELINE)
    tasks: list[dict[str, Any]] = []
    for pair in pairs:
        tasks.append({"task": pair["task"]})
        for name, figures in (("loss", pair["mean_train_loss"]), ("accuracy", pair["mean_accuracy"])):
            tasks[-1] |= {f"{name}_mezo": figures[mezo], name: figures[label]}
    return {
        **{"file": file, "passes": config["passes"], "seeds": config["seeds"], "tasks": tasks},
        "interval": None if judgement is None else judgement["intervals"]["mean_loss_difference_to_mezo"],
        "controls": {} if judgement is None else dict(judgement["win_rate_over_each_control"]),
        "departures": list(found["departures"]),
    }


def brief(results: Json) -> str:
    """The most important of a tuner's results in one line; empty where there are no readable figures."""
    try:
        if EVALUATION in results:
            return _headline(results[EVALUATION])
        if TESTS in results:
            return "; ".join(f"{row['verdict']} on {row['task']} ({row['gain']:+.3f} nats)" for row in results[TESTS])
        if results.get("validation_loss_mezo") is not None:
            return f"validation loss {results['validation_loss']:.4g}, of MeZO {results['validation_loss_mezo']:.4g}"
        numbers = [(name, value) for name, value in results.items() if type(value) in (int, float)]
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers[:RESULTS_SHOWN])
    except UNREADABLE:
        return ""


def _headline(found: Json) -> str:
    tasks, between = found["tasks"], found["interval"]
    lower = sum(row["loss"] < row["loss_mezo"] for row in tasks)
    difference = sum(row["loss"] - row["loss_mezo"] for row in tasks) / len(tasks)
    interval = f" (95 % interval {between[0]:+.3f} to {between[1]:+.3f})" if between and None not in between else ""
    return f"loss below MeZO's on {lower} of {len(tasks)} tasks, {difference:+.3f} nats in the mean{interval}"


def sections(results: Json) -> list[str]:
    """Results from files as paragraphs and tables in Markdown; empty where there are none, or not readable ones."""
    parts: list[str] = []
    try:
        if (found := results.get(EVALUATION)) is not None:
            protocol = f"{found['passes']} forward passes, means over {found['seeds']} seeds (`{found['file']}`)"
            parts.append(
                f"Beside MeZO by `l2l meta-evaluate`, {protocol}: {_headline(found)}. Losses are those of training, in nats."
            )
            lines = ["| task | loss, MeZO | loss, tuner | accuracy, MeZO | accuracy, tuner |", "|---|--:|--:|--:|--:|"]
            for row in found["tasks"]:
                shares = " | ".join(f"{100 * row[name]:.1f} %" for name in ("accuracy_mezo", "accuracy"))
                lines.append(f"| {row['task']} | {row['loss_mezo']:.3f} | {row['loss']:.3f} | {shares} |")
            parts.append("\n".join(lines))
            if found["controls"]:
                rates = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in found["controls"].items())
                parts.append(f"Share of tasks on which it ends below each control: {rates}.")
            if found["departures"]:
                parts.append(f"Departures from the protocol: {'; '.join(found['departures'])}.")
        if results.get(TESTS):
            parts.append("Against sigma = 1 by `l2l tuners test`, at equal passes and with the same step control:")
            lines = ["| model | task | passes | seeds | gain, nats | 95 % interval | verdict |"]
            lines.append("|---|---|--:|--:|--:|---|---|")
            for row in results[TESTS]:
                low, high = row["interval"]
                size = f"{row['passes']} | {row['seeds']} | {row['gain']:+.4f} | {low:+.4f} to {high:+.4f}"
                lines.append(f"| {row['model']} | {row['task']} | {size} | {row['verdict']} |")
            parts.append("\n".join(lines))
        return parts
    except UNREADABLE:
        return []


def render(tuner: TunerModel, config: dict[str, Any]) -> str:
    """The card as Markdown, with the metadata header that the hub reads."""
    base, licence, results = config["base_model"], config["recipe"].get("licence"), config["results"]
    metadata = ["library_name: l2l", f"base_model: {base}", "tags: [zeroth-order, learned-optimizer, l2l]"]
    if isinstance(licence, str) and LICENCE.fullmatch(licence):  # the hub takes names, no sentences
        metadata.append(f"license: {licence.lower()}")
    example = [
        *("```python", "import l2l", "", f'model = l2l.load_model("{base}")'),
        'tuner = l2l.Tuner.from_pretrained("this directory or its hub id")',
        *("optimizer = l2l.ZOFineTuner(model, tuner)", "```"),
    ]
    reach = " Nothing in it belongs to a block: it serves models of other sizes and families." if tuner.size_free else ""
    kinds = "" if tuner.fingerprint.kinds else " (kinds by shape alone: embeddings count as matrices)"
    rows = ["| kind | blocks | min | median | max | CV |", "|---|--:|--:|--:|--:|--:|"]
    for row in diagnostics.sigma_by_kind(tuner):
        values = f"{row.smallest:.4g} | {row.median:.4g} | {row.largest:.4g} | {row.variation:.3f}"
        rows.append(f"| {row.kind} | {row.blocks} | {values} |")
    at = f"weights of mean 0 and variance {diagnostics.TYPICAL_VARIANCE:g}, losses of {diagnostics.TYPICAL_LOSS:g}"
    tables = sections(results)
    own = {name: value for name, value in results.items() if not tables or name not in (EVALUATION, TESTS)}
    parts = [
        "\n".join(["---", *metadata, "---", f"# Tuner for {base}"]),
        f"Sets the perturbation scale (sigma) of each of the {len(tuner.fingerprint.names)} blocks of `{base}` in "
        f"zeroth-order fine-tuning.{reach}",
        "\n".join(example),
        f"Architecture `{config['architecture']}` {_short(config['architecture_args'])}, features "
        f"`{config['features']}`, normalizer {_short(config['normaliser'])}. Basis: {diagnostics.basis_line(tuner)}. "
        f"Block schedule: {diagnostics.schedule_line(tuner)}.",
        *([f"Training plan, for what a user leaves open: {plan_line(tuner.plan)}."] if tuner.plan else []),
        f"Distance from its initialisation, relative: {_spread(diagnostics.movement(tuner), tuner, '.4f')}.",
        f"Change of sigma since, relative: {_spread(diagnostics.sigma_change(tuner), tuner, '+.4f')}.",
        f"Sigma before normalisation, at {at} and a last sigma of 1{kinds}:",
        "\n".join(rows),
        *("## Recipe", _json(config["recipe"]), "## Results"),
        *(tables if results else ["None are recorded."]),
        *(["In its own training:"] if tables and own else []),
        *([_json(own)] if own else []),
        f"Made with {', '.join(f'{name} {number}' for name, number in config['versions'].items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _spread(values: list[float], tuner: TunerModel, form: str) -> str:
    if not values:
        return "unknown"
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:VALUES_SHOWN]
    largest = ", ".join(f"`{tuner.fingerprint.names[i]}` {values[i]:{form}}" for i in order)
    return f"median {median(values):{form}}, largest {largest}"


def _short(values: dict[str, Any]) -> str:
    """JSON in one line; long lists and tables are replaced by their lengths."""
    long = [name for name, value in values.items() if isinstance(value, list | dict) and len(value) > VALUES_SHOWN]
    return json.dumps(values | {name: f"{len(values[name])} values" for name in long})


def _json(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=1)}\n```"
