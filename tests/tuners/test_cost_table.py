"""The script behind the cost table of docs/learn-a-tuner.md: what it counts, and that the page holds what it writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from l2l.costs import Load, meta_model, model_shape

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "learn-a-tuner.md"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("cost_table", ROOT / "benchmarks" / "cost_table.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def cells(name: str) -> list[str]:
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", ["OPT-125m", "Llama-3.2-1B"])
def test_the_page_holds_the_rows_that_the_script_writes(script: Any, name: str):
    assert list(script.row(name, script.cost(script.MODELS[name]())).values()) == cells(name)


def test_the_page_has_a_row_for_every_model_from_small_to_large(script: Any):
    sizes = [float(cells(name)[1].removesuffix(" B")) for name in script.MODELS]
    assert sizes == sorted(sizes)
    assert sizes[0] == pytest.approx(0.125, rel=0.01)
    assert sizes[-1] == pytest.approx(70.6, rel=0.01)


def test_the_ways_of_tuning_stand_in_the_order_of_what_they_hold(script: Any):
    found = script.cost(script.MODELS["OPT-125m"]())
    assert found.forward < found.learned_half < found.learned < found.meta < found.ratio < found.adamw
    assert found.ratio - found.meta == 4 * found.parameters
    assert found.adamw > 16 * found.parameters  # weights, gradients, two moments


def test_meta_training_holds_weights_velocity_gradients_in_flight_and_activations(script: Any):
    shape = model_shape(meta_model(script.MODELS["OPT-125m"]()))
    little = script.meta_bytes(shape, Load(1, 2, 1)) / (4 * shape.parameters)
    assert 2 + max(shape.blocks) / shape.parameters < little < 2.5
    assert script.meta_bytes(shape, Load(8, 256, 8)) > script.meta_bytes(shape, Load(4, 256, 4))


def test_only_what_stands_between_the_markers_is_replaced(script: Any):
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.replaced(page, "new") == f"before\n{script.BEGIN}\n\nnew\n\n{script.END}\nafter\n"
    for broken in ("before", page + page, f"{script.END}{script.BEGIN}"):
        with pytest.raises(ValueError, match="once each, in this order"):
            script.replaced(broken, "new")
