"""The model of ``l2l simulate`` against processes of this machine: zeroth-order steps of ``l2l/tiny`` on 1, 2 and 4 ranks.

Each rank is a process with one thread. Ranks exchange losses over pipes by recursive doubling, as the model assumes. What the
model is given is measured in one process: a forward pass at two batch sizes, a traversal of all weights with noise, the update
along all directions, and a message between two processes.

Two things are compared. Processor seconds of the slowest rank, which other processes of the machine hardly change: what a step
would take if each rank had a core of its own, the exchange apart. And seconds of the clock: ranks beyond the cores take turns,
so no gain is predicted from there on; on a machine that does other work, this comparison says nothing.

python benchmarks/simulated_ranks.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from statistics import median

import torch

from l2l.noise import Key
from l2l.params import Blocks, Direction, PerturbedParameters
from l2l.report.console import print_table
from l2l.tasks.losses import batch_loss
from l2l.tools.bench import hardware
from l2l.tools.simulate import SIDES, Copy, Network, data_parallel, population
from l2l.train.config import FineTuneConfig
from l2l.train.trainer import prepare_fine_tuning

RANKS = (1, 2, 4)
EPSILON, LR = 1e-3, 1e-4


class Rank:
    """A process's copy of the model, and its pipes to the others, by how far these are."""

    def __init__(self, number: int, ranks: int, pipes: Sequence[Connection], rows: int) -> None:
        torch.set_num_threads(1)
        self.number, self.ranks, self.pipes, self.rows = number, ranks, pipes, rows
        options = FineTuneConfig(lr=LR, batch_size=rows, train_size=200, dev_size=8, test_size=8, progress=False)
        context = prepare_fine_tuning(options)
        self.model, self.batcher = context.model, context.closures.batcher
        self.theta = PerturbedParameters(Blocks.of(self.model), perturb="in_place")

    def loss(self, step: int, number: int, parts: int) -> Callable[[], float]:
        """The loss on a part of a step's batch, as a function of the present weights."""
        indices = self.batcher.indices(step)
        part = self.batcher.batch(indices[number * len(indices) // parts : (number + 1) * len(indices) // parts])

        def computed() -> float:
            with torch.no_grad():
                return float(batch_loss(self.model, part, self.batcher.form))

        return computed

    def direction(self, step: int, draw: int = 0) -> Direction:
        """The direction of a step."""
        return Direction(Key(0, step, draw), (1.0,) * len(self.theta.blocks))

    def exchanged(self, values: list[float], join: Callable[[list[float], list[float]], list[float]]) -> list[float]:
        """The values of all ranks, joined: recursive doubling."""
        for level, pipe in enumerate(self.pipes):
            pipe.send(values)
            other = pipe.recv()
            first = self.number >> level & 1 == 0
            values = join(values, other) if first else join(other, values)
        return values

    def sides(self, direction: Direction, loss: Callable[[], float]) -> list[float]:
        """Losses on both sides of a direction; theta is left on the second."""
        found = []
        for distance in (EPSILON, -EPSILON):
            self.theta.perturb(direction, distance)
            found.append(self.theta.evaluate(loss))
        return found

    def data_parallel_step(self, step: int) -> None:
        """A step on this rank's rows of the batch."""
        direction, loss = self.direction(step), self.loss(step, self.number, self.ranks)
        with self.theta.step():
            sides = self.sides(direction, loss)
            plus, minus = self.exchanged(sides, lambda a, b: [x + y for x, y in zip(a, b, strict=True)])
            slope = (plus - minus) / (2 * EPSILON * self.ranks)
            self.theta.add(direction, [-LR * slope] * len(self.theta.blocks))

    def population_step(self, step: int, directions: int) -> None:
        """A step on this rank's directions, and the update along all of them."""
        loss, own = self.loss(step, 0, 1), directions // self.ranks
        with self.theta.step():
            sides = [
                value
                for draw in range(self.number * own, (self.number + 1) * own)
                for value in self.sides(self.direction(step, draw), loss)
            ]
            losses = self.exchanged(sides, lambda a, b: a + b)
            for draw in range(directions):
                slope = (losses[2 * draw] - losses[2 * draw + 1]) / (2 * EPSILON * directions)
                self.theta.add(self.direction(step, draw), [-LR * slope] * len(self.theta.blocks))


def work(number: int, ranks: int, pipes: Sequence[Connection], parent: Connection, rows: int, directions: int) -> None:
    """A rank's process: takes a step of the kind and number that the parent names, and says how long it took."""
    rank = Rank(number, ranks, pipes, rows)
    parent.send("ready")
    while (asked := parent.recv()) is not None:
        kind, step = asked
        began = time.perf_counter(), time.process_time()
        rank.data_parallel_step(step) if kind == "data" else rank.population_step(step, directions)
        parent.send((time.perf_counter() - began[0], time.process_time() - began[1]))


def measured_steps(ranks: int, rows: int, directions: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of the slowest rank in each round, by kind of step, without the first round."""
    context = get_context("spawn")
    pipes: list[list[Connection]] = [[] for _ in range(ranks)]
    for level in range(ranks.bit_length() - 1):
        for low in (number for number in range(ranks) if number >> level & 1 == 0):
            one, other = Pipe()
            pipes[low].append(one)
            pipes[low | 1 << level].append(other)
    ends = [Pipe() for _ in range(ranks)]
    given = (rows, directions)
    processes = [context.Process(target=work, args=(i, ranks, pipes[i], ends[i][1], *given), daemon=True) for i in range(ranks)]
    for process in processes:
        process.start()
    parents = [end for end, _ in ends]
    for parent in parents:
        assert parent.recv() == "ready"
    found: dict[str, list[tuple[float, float]]] = {"data": [], "population": []}
    for step in range(rounds + 1):
        for kind, seconds in found.items():
            for parent in parents:
                parent.send((kind, step))
            every = [parent.recv() for parent in parents]
            if step:
                seconds.append((max(one for one, _ in every), max(busy for _, busy in every)))
    for parent in parents:
        parent.send(None)
    for process in processes:
        process.join()
    return found


def timed(function: Callable[[], object], rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Median seconds of some calls after a first one."""
    found = []
    for _ in range(rounds + 1):
        began = clock()
        function()
        found.append(clock() - began)
    return median(found[1:])


def measured_copy(rows: int, directions: int, rounds: int) -> Copy:
    """A copy in this process alone; its tokens are the rows of a batch."""
    rank = Rank(0, 1, (), rows)
    whole, part = (timed(rank.loss(1, 0, parts), rounds) for parts in (1, 4))
    per_row = (whole - part) / (rows - rows / 4)

    def moved() -> None:
        with rank.theta.step():
            for side in (1, -1):
                rank.theta.perturb(rank.direction(1), side * EPSILON)
                rank.theta.evaluate(lambda: 0.0)
            rank.theta.add(rank.direction(1), [0.0] * len(rank.theta.blocks))

    def updated() -> None:
        with rank.theta.step():
            for draw in range(directions):
                rank.theta.add(rank.direction(1, draw), [LR] * len(rank.theta.blocks))

    traversal = timed(moved, rounds) / SIDES
    return Copy(whole - rows * per_row, per_row, traversal, timed(updated, rounds) / directions)


def _answer(pipe: Connection) -> None:
    while (value := pipe.recv()) is not None:
        pipe.send(value)


def measured_latency(messages: int = 2000) -> float:
    """Seconds of a message of two floats from process to process: half of the median to and fro."""
    one, other = Pipe()
    process = get_context("spawn").Process(target=_answer, args=(other,), daemon=True)
    process.start()

    def there_and_back() -> None:
        one.send([0.0, 0.0])
        one.recv()

    found = timed(there_and_back, messages, time.perf_counter) / 2
    one.send(None)
    process.join()
    return found


def main() -> None:
    """Measure and predict; print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch; a multiple of 4")
    parser.add_argument("--directions", type=int, default=8, help="of a population step; a multiple of 4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file of JSON with the figures")
    options = parser.parse_args()
    copy = measured_copy(options.rows, options.directions, options.rounds)
    latency, cores = measured_latency(), os.cpu_count()
    shared, own = (Network(latency, float("inf"), cores=count) for count in (cores, None))
    rows = []
    for ranks in RANKS:
        found = measured_steps(ranks, options.rows, options.directions, options.rounds)
        for kind, seconds in found.items():
            clock, busy = (median(values) for values in zip(*seconds, strict=True))
            given = (options.rows,) if kind == "data" else (options.rows, options.directions)
            predict = data_parallel if kind == "data" else population
            alone, together = predict(copy, own, ranks, *given), predict(copy, shared, ranks, *given)
            row = {"step": kind, "ranks": ranks, "processor, s": busy, "predicted": alone.compute + alone.noise}
            row |= {"predicted / processor": (alone.compute + alone.noise) / busy, "clock, s": clock}
            rows.append(row | {"predicted, shared cores": together.total, "bytes sent": int(together.bytes_sent)})
    machine = hardware()
    machine.pop("versions")
    print_table("machine", [machine])
    print_table("measured in one process", [asdict(copy) | {"latency": latency, "cores": cores}])
    print_table("steps", sorted(rows, key=lambda row: str(row["step"])))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "copy": asdict(copy), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
