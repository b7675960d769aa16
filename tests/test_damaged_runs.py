"""Kind B4 of issue 16, *nothing lost*: 100 kinds of damage to the directory of an interrupted run.

Each is named, in a warning or an error. The run goes on from the newest good checkpoint and ends with the bits of the
uninterrupted run; or it is refused, nothing in the directory changes, and the way out that the error prints ends with them.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from daily import daily_slice

from l2l.cli import main
from l2l.meta.module import MetaTraining
from l2l.train.runlog import read_log
from l2l.train.trainer import Session

pytestmark = pytest.mark.in_turn

SIZES = "--steps 8 --batch_size 2 --train_size 8 --dev_size 4 --lr 1e-4 --checkpoint_every 2 --log_every 1 --progress false"
COMMANDS = {
    "fine-tune": "--task world_topic --test_size 4 --eval_every 2 --train_layers top:1 --prefix_cache disk",
    "meta-train": "--tasks world_topic,world_job --validation_tasks world_season --validate_every 3 --validation_steps 1 "
    "--restart_every 3 --outer_lr 0.1",
}
CUT = 7
"""Steps after which a run is broken off; its checkpoints are of 4 and 6 steps."""
ENDS = {"fine-tune": ("model/model.safetensors", "steps.l2l"), "meta-train": ("tuner.safetensors",)}
"""What a run leaves."""
LAST, EARLIER, LOG, METRICS = "checkpoint.safetensors", "checkpoint.1.safetensors", "steps.l2l", "metrics.csv"
BOTH = f"{LAST} {EARLIER}"
COMMON = (LAST, BOTH, "run.json", "config.yaml", METRICS)
FILES = {
    "fine-tune": (*COMMON, "best.safetensors", LOG, "prefix_cache.safetensors"),
    "meta-train": (*COMMON, "initial.safetensors", "measured.safetensors"),
}
"""All that is read when a run is continued: ``theta.safetensors`` is written anew before it is read, events never are."""


class Cut(BaseException):
    """Stands for whatever ends a process."""


def remove(path: Path, end: int, draw: random.Random, other: Path) -> None:
    path.unlink()


def empty(path: Path, end: int, draw: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path, end: int, draw: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(end)])


def flip_a_bit(path: Path, end: int, draw: random.Random, other: Path) -> None:
    content = bytearray(path.read_bytes())
    place = draw.choice([i for i in range(end) if chr(content[i]).isalnum() or path.suffix not in (".yaml", ".json", ".csv")])
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def scribble(path: Path, end: int, draw: random.Random, other: Path) -> None:
    content = path.read_bytes()
    begin = draw.randrange(end)
    path.write_bytes(content[:begin] + draw.randbytes(min(4096, len(content) - begin)) + content[begin + 4096 :])


def dangle(path: Path, end: int, draw: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("moved away"))


def replace_by_another_runs(path: Path, end: int, draw: random.Random, other: Path) -> None:
    shutil.copy(other / path.name, path)


def swap(path: Path, end: int, draw: random.Random, other: Path, name: str = "") -> None:
    contents = path.read_bytes(), path.with_name(name).read_bytes()
    path.with_name(name).write_bytes(contents[0])
    path.write_bytes(contents[1])


DAMAGES: dict[str, Callable[..., None]] = {
    "missing": remove,
    "empty": empty,
    "cut": cut_short,
    "flipped": flip_a_bit,
    "of another run": replace_by_another_runs,
    "flipped elsewhere": flip_a_bit,
    "overwritten": scribble,
    "a dangling link": dangle,
}
SWAPS = ((LAST, "best.safetensors"), ("best.safetensors", "prefix_cache.safetensors"), (LOG, LAST), (METRICS, "run.json"))
SWAPS += (("config.yaml", METRICS),)
CASES = [("fine-tune", file, damage) for file in FILES["fine-tune"] for damage in DAMAGES]
CASES += [("meta-train", file, damage) for file in FILES["meta-train"] for damage in list(DAMAGES)[:5]]
CASES = [case for case in CASES if case[:2] != ("meta-train", BOTH) or case[2] == "flipped"]
CASES += [("fine-tune", file, f"swapped with {name}") for file, name in SWAPS]
DAMAGES |= {f"swapped with {name}": partial(swap, name=name) for _, name in SWAPS}


def test_there_are_a_hundred():
    assert len(CASES) == len(set(CASES)) == 100


def command(kind: str, out: Path, *more: str) -> list[str]:
    return [kind, *SIZES.split(), *COMMANDS[kind].split(), "--out", str(out), *more]


def broken_off(kind: str, out: Path, *more: str) -> None:
    """Run the command until :data:`CUT` steps are taken."""
    owner, name = (Session, "step") if kind == "fine-tune" else (MetaTraining, "training_step")
    whole = getattr(owner, name)

    def step(self, *arguments: object) -> object:
        if (self.progress.step if isinstance(self, Session) else self.global_step) == CUT:
            raise Cut
        return whole(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(owner, name, step)
        main(command(kind, out, *more))


def contents(out: Path, names: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """The files of a run by name, without events and the lock."""
    paths = out.rglob("*") if names is None else (out / name for name in names)
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.is_file() and "events" not in path.name}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """``<command>/whole``, ``<command>/cut`` and ``<command>/other``, each made when it is asked for."""
    yield tmp_path_factory.mktemp("runs")


def made(runs: Path, kind: str) -> Path:
    folder = runs / kind
    if not folder.exists():
        assert main(command(kind, folder / "whole")) == 0
        broken_off(kind, folder / "cut")
        broken_off(kind, folder / "other", "--seed", "1")
        assert {name for file in FILES[kind] for name in file.split()} <= {path.name for path in (folder / "cut").iterdir()}
    return folder


def reach(path: Path) -> int:
    """Bytes that a run needs of a file: what follows the checkpoint is written anew, and may be cut short by any kill."""
    if path.name == LOG:
        return read_log(path).ends[CUT - 1]
    return path.stat().st_size * 2 // 3 if path.name == METRICS else path.stat().st_size


@pytest.mark.parametrize(("kind", "file", "damage"), daily_slice(CASES, 3, name="{} {} {}".format))
def test_damage_is_named_and_the_run_goes_on_or_is_refused_with_a_way_out_that_works(
    kind, file, damage, runs, tmp_path, capsys, caplog
):
    folder, out = made(runs, kind), tmp_path / "run"
    shutil.copytree(folder / "cut", out)
    draw = random.Random(f"{kind} {file} {damage}")
    for name in file.split():
        DAMAGES[damage](out / name, reach(out / name), draw, folder / "other")
    before = contents(out)
    capsys.readouterr()
    caplog.clear()
    code = main(command(kind, out))
    said = capsys.readouterr().err + caplog.text
    assert all(f"/{name}" in said for name in file.split()), said
    ends = ENDS[kind]
    if code:
        assert code == 2
        assert contents(out) == before, "a refusal changes nothing"
        if "move it away" in said:
            (out / LOG).rename(tmp_path / LOG)
            assert main(command(kind, out)) == 0
        else:
            assert main(command(kind, out, "--overwrite", "true")) == 0
        assert file in (BOTH, LOG), f"{file} is not needed: {said}"
    if file == LOG and (damage in ("missing", "a dangling link") or "move it away" in said):
        assert read_log(out / LOG).header["first"] in (4, 6), "the new log says where it begins"
        ends = ends[:1]
    assert contents(out, ends) == contents(folder / "whole", ends)
    assert not list(out.glob(".writing-*")) and not list(out.glob("checkpoint*"))
