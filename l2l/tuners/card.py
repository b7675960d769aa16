"""The card of a tuner: what it is, how it was made, what it reached. Written from its config alone."""

from __future__ import annotations

import json
from typing import Any

import torch

from l2l.tuners.tuner import Tuner, build_network


def movement(tuner: Tuner) -> list[float]:
    """How far each block's network moved from its initialisation, relative to the initialisation's norm."""
    fresh = build_network(tuner.architecture, tuner.architecture_args).state_dict()
    learned = tuner.network.state_dict()
    blocks = len(tuner.fingerprint.names)

    def squares(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((v.double() ** 2).reshape(blocks, -1).sum(1) for v in values.values())  # pyright: ignore[reportReturnType]

    moved = squares({name: learned[name].double() - fresh[name].double() for name in fresh})
    return torch.sqrt(moved / squares(fresh)).tolist()


def render(tuner: Tuner, config: dict[str, Any]) -> str:
    """The card as Markdown, with the metadata header that the hub reads."""
    base = config["base_model"]
    moved = movement(tuner)
    order = sorted(range(len(moved)), key=lambda i: -moved[i])[:5]
    lines = [
        "---",
        "library_name: l2l",
        f"base_model: {base}",
        "tags: [zeroth-order, learned-optimizer, l2l]",
        "---",
        f"# Tuner for {base}",
        "",
        f"Sets the perturbation scale (sigma) of each of the {len(moved)} blocks of `{base}` in zeroth-order "
        "fine-tuning.",
        "",
        "```python",
        "import l2l",
        "",
        f'model = l2l.load_model("{base}")',
        'tuner = l2l.Tuner.from_pretrained("this directory or its hub id")',
        "optimizer = l2l.ZOFineTuner(model, tuner)",
        "```",
        "",
        f"Architecture `{config['architecture']}` {json.dumps(config['architecture_args'])}, "
        f"normaliser {json.dumps(config['normaliser'])}.",
        "",
        f"Distance from its random initialisation, relative: median {_median(moved):.4f}, largest "
        + ", ".join(f"`{tuner.fingerprint.names[i]}` {moved[i]:.4f}" for i in order)
        + ".",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(config["recipe"], indent=1),
        "```",
        "",
        "## Results",
        "",
        "```json",
        json.dumps(config["results"], indent=1),
        "```",
        "",
        f"Made with {', '.join(f'{name} {number}' for name, number in config['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
