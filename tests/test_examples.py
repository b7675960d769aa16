"""Each script of `examples/` runs as a reader would run it, in an empty directory, and does what it says it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LONGEST = 75
"""Lines of an example, its docstring and empty lines aside."""

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def output_of(name: str, folder: Path, launcher: tuple[str, ...] = (), seconds: float = 240) -> str:
    """What an example prints, run with this interpreter and one thread in `folder`, in at most `seconds`; by a launcher, in
    several processes."""
    root = EXAMPLES.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    """The groups of the first place that a pattern matches, as numbers."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what was printed:\n{text}"
    return tuple(float(group.replace(",", "")) for group in found.groups())


def before_after(text: str) -> tuple[float, float]:
    before, after = numbers(r"([\d.]+) before, ([\d.]+) after", text)
    return before, after


@pytest.mark.in_turn
def test_own_loop_lowers_the_loss_and_stores_no_gradient(tmp_path: Path):
    text = output_of("own_loop", tmp_path)
    (before,) = numbers(r"before: ([\d.]+)", text)
    after, passes = numbers(r"after: ([\d.]+) nats per token, by (\d+)", text)
    assert after < 0.7 * before
    assert passes == 180
    assert "gradients stored: 0" in text


@pytest.mark.in_turn
def test_a_task_from_a_csv_is_learned_and_leaves_a_model(tmp_path: Path):
    text = output_of("csv_task", tmp_path)
    before, after = before_after(text)
    assert after < before
    assert numbers(r"'train': (\d+), 'dev': (\d+), 'test': (\d+)", text)[0] > 50
    assert (tmp_path / "runs/examples/csv_task/run/model").is_dir()


@pytest.mark.in_turn
def test_lora_trains_few_parameters_and_comes_back_the_same(tmp_path: Path):
    text = output_of("lora", tmp_path)
    before, after = before_after(text)
    trained, total = numbers(r"trained: ([\d,]+) of ([\d,]+)", text)
    assert after < before
    assert trained < 0.05 * total
    assert "the same logits: True" in text


@pytest.mark.in_turn
def test_a_tuner_is_learned_saved_and_used_on_a_task_outside_its_pool(tmp_path: Path):
    text = output_of("learn_a_tuner", tmp_path)
    assert "saved: README.md, config.json, tuner.safetensors" in text
    _, learned = text.split("learned:")
    before, after = before_after(learned)
    assert after < before


@pytest.mark.in_turn
def test_a_method_of_ones_own_does_not_depend_on_the_unit_of_the_loss(tmp_path: Path):
    text = output_of("own_method", tmp_path)
    (one,) = numbers(r"loss times 1: RMSMeZO ends at ([\d.]+)", text)
    (other,) = numbers(r"loss times 0.01: RMSMeZO ends at ([\d.]+)", text)
    assert one == pytest.approx(other, rel=0.02)
    before, after = before_after(text)
    assert after < before


@pytest.mark.slow
def test_a_reward_rises_by_three_standard_errors_and_its_log_rebuilds_the_weights(tmp_path: Path):
    text = output_of("reward", tmp_path, seconds=600)
    print(text)
    before, before_error = numbers(r"at the start: ([\d.]+), standard error ([\d.]+)", text)
    after, after_error = numbers(r"at the end: ([\d.]+), standard error ([\d.]+)", text)
    assert after > before + 3 * max(before_error, after_error)
    assert "rebuilds the weights of the best one: True" in text


@pytest.mark.in_turn
def test_a_killed_run_continues_to_the_same_bits_and_its_log_rebuilds_the_weights(tmp_path: Path):
    text = output_of("resume_and_replay", tmp_path)
    assert re.search(r"^killed: .*checkpoint", text, re.MULTILINE)
    assert numbers(r"largest difference to a run that was not killed: ([\d.e+-]+)", text) == (0.0,)
    off, moved = numbers(r"off by ([\d.e+-]+), where training moved by ([\d.e+-]+)", text)
    assert off == 0 < moved


@pytest.mark.in_turn
def test_methods_are_compared_at_equal_passes(tmp_path: Path):
    text = output_of("compare_methods", tmp_path)
    found = re.findall(r"^(\w+): loss ([\d.]+) after (\d+) passes", text, re.MULTILINE)
    losses = [float(loss) for _, loss, _ in found]
    assert {label for label, _, _ in found} == {"mezo", "learned"}
    assert losses == sorted(losses)
    assert all(40 <= int(passes) < 50 for _, _, passes in found)
    assert (tmp_path / "runs/examples/compare_methods/out/index.html").is_file()


PROCESSES = pytest.mark.parametrize("launcher", [(), pytest.param(TWO_PROCESSES, marks=pytest.mark.slow)], ids=["1", "2"])


def goes_on_from_what_it_saved(text: str, launcher: tuple[str, ...]) -> None:
    assert numbers(r"processes: (\d+), steps: (\d+)", text) == (2 if launcher else 1, 12)
    before, after = before_after(text)
    assert after < before
    assert "continued from the saved state to the same loss: True" in text
    assert "the same weights in all processes: True" in text


@pytest.mark.in_turn
@PROCESSES
def test_a_loop_under_accelerate_goes_on_from_what_it_saved(tmp_path: Path, launcher: tuple[str, ...]):
    pytest.importorskip("accelerate", reason="accelerate comes with the extra 'trainer'")
    goes_on_from_what_it_saved(output_of("accelerate_loop", tmp_path, launcher), launcher)


@pytest.mark.in_turn
@PROCESSES
def test_a_loop_under_fabric_goes_on_from_what_it_saved(tmp_path: Path, launcher: tuple[str, ...]):
    goes_on_from_what_it_saved(output_of("fabric_loop", tmp_path, launcher), launcher)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_says_what_it_is_and_has_a_test(path: Path):
    source = path.read_text()
    docstring, code = re.match(r'(?:# %% .markdown.\n)?"""(.*?)"""(.*)', source, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert len(docstring) > 200
    assert len([line for line in code.splitlines() if line.strip(" #%")]) <= LONGEST
    assert f'output_of("{path.stem}"' in Path(__file__).read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script(path: Path):
    script, notebook = path.read_text(), path.with_suffix(".ipynb")
    if not script.startswith("# %%"):
        assert "processes" in script or "__file__" in script, "a notebook runs in one process and has no file"
        assert not notebook.exists()
        return
    cells = [cell.partition("\n")[2].strip() for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]]
    written = json.loads(notebook.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in written] == [cells[0].strip('"\n'), *cells[1:]]
    assert [cell["cell_type"] for cell in written] == ["markdown"] + ["code"] * (len(cells) - 1)
    assert not any(cell.get("outputs") for cell in written)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebooks_run_from_top_to_bottom():
    pytest.importorskip("jupytext", reason="jupytext comes with the extra 'notebooks'")
    root = EXAMPLES.parent
    done = subprocess.run(
        [sys.executable, root / ".ci/notebooks", "--run"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert len(done.stdout.splitlines()) == len(list(EXAMPLES.glob("*.ipynb")))
