"""The only code that moves parameters: looking along a direction, stepping along it, coming back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from l2l.blocks import Blocks
from l2l.noise import Distribution, Key, add_noise_, round_scale, standard_deviation


@dataclass(frozen=True)
class Direction:
    """A recipe, never a tensor: u_b = factor * sigma[b] * z_b, with z_b of unit variance."""

    key: Key
    sigma: tuple[float, ...]
    """One scale per block, in the order of the blocks."""
    distribution: Distribution = "gaussian"
    factor: float = 1.0
    """Common to all blocks: what a normaliser makes of sigma."""

    def __post_init__(self) -> None:
        bad = next((value for value in self.sigma if not 0.0 <= value < float("inf")), None)
        if bad is not None:
            raise ValueError(f"sigma is {bad}: it must be finite and not negative; the tuner or its input is broken")


@final
class Theta:
    """The parameters and where they stand: at home, or at some distance along one direction.

    Walking is in place: a perturbation of float32 weights comes back within one rounding per walk, and with the same
    bits in every run. Whatever is raised inside :meth:`step`, theta is back where the step began when it leaves.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._away: tuple[Direction, float] | None = None
        self._added: list[tuple[Direction, tuple[float, ...]]] = []
        self._undo: Callable[[], None] | None = None
        self._shrunk: tuple[float, ...] | None = None

    def look(self, direction: Direction, distance: float) -> None:
        """Stand at ``home + distance * u``."""
        if self._away is not None and self._away[0] == direction and self._away[1] == -distance:
            walk = 2 * distance  # exactly twice the rounded scale: one addition, one rounding
        else:
            self.home()
            walk = distance
        self._walk(direction, [[walk] * len(self.blocks)], (direction, distance))

    def home(self) -> None:
        """Stand where no look was ever taken."""
        if self._away is not None:
            direction, distance = self._away
            self._walk(direction, [[-distance] * len(self.blocks)], None)

    def add(self, direction: Direction, amounts: Sequence[float]) -> None:
        """Move home by ``amounts[b] * u_b``. A return from the same direction is merged into the same traversal."""
        walks = [list(amounts)]
        if self._away is not None and self._away[0] == direction:
            walks.insert(0, [-self._away[1]] * len(self.blocks))
        else:
            self.home()
        self._walk(direction, walks, None, (direction, tuple(amounts)))

    def shrink(self, factors: Sequence[float]) -> None:
        """Multiply each block by its factor (weight decay). Once in a step, and last.

        Raises:
            ValueError: a factor is not positive; no block has moved then.
        """
        self.home()
        wrong = [factor for factor in factors if not factor > 0]
        if wrong:
            raise ValueError(f"weights would shrink by the factor {wrong[0]}: lr * weight_decay must be below 1")
        self._multiply(tuple(factors))

    def shift(self, deltas: Mapping[int, Tensor], scale: float) -> None:
        """Add ``scale * delta`` to the blocks listed: a first-order step. Not undone."""
        self.home()
        with torch.no_grad(), _uninterrupted():
            for index, delta in deltas.items():
                self.blocks[index].tensor.detach().add_(delta, alpha=scale)

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set every block to the tensor of its name: what a checkpoint holds.

        Raises:
            ValueError: names or shapes are not those of the blocks; nothing is set then.
        """
        shapes = {block.name: tuple(block.tensor.shape) for block in self.blocks}
        given = {name: tuple(value.shape) for name, value in values.items()}
        if shapes != given:
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise ValueError(
                f"these weights are of another model: {len(wrong)} blocks differ, the first is {wrong[0]!r}"
            )
        self._away = None
        self._copy({index: values[block.name] for index, block in enumerate(self.blocks)})

    def interpolate(
        self, anchor: Mapping[int, Tensor], here: Mapping[int, Tensor], ratios: Mapping[int, float]
    ) -> None:
        """Set block i to ``anchor + ratio * (here - anchor)``, for the blocks listed; ratio 1 is ``here``, bit for bit.

        Until the step ends, an error puts ``here`` back first.
        """
        self.home()
        self._undo = lambda: self._copy(here)
        with torch.no_grad(), _uninterrupted():
            for index, ratio in ratios.items():
                torch.lerp(anchor[index], here[index], ratio, out=self.blocks[index].tensor.detach())

    @contextmanager
    def step(self) -> Iterator[Theta]:
        """One step: on the way out theta is home; after an error it is back where the step began."""
        self._added, self._undo, self._shrunk = [], None, None
        try:
            yield self
        except BaseException:
            with _uninterrupted():  # a second Ctrl-C waits as well
                self._roll_back()
                self.home()
            raise
        finally:
            self.home()
            self._added, self._undo, self._shrunk = [], None, None

    def _roll_back(self) -> None:
        if self._shrunk is not None:
            self._multiply(tuple(1 / factor for factor in self._shrunk))
        if self._undo is not None:
            self._undo()
        for direction, amounts in reversed(tuple(self._added)):
            self.add(direction, [-amount for amount in amounts])

    def _multiply(self, factors: tuple[float, ...]) -> None:
        with torch.no_grad(), _uninterrupted():
            for block, factor in zip(self.blocks, factors, strict=True):
                if factor != 1.0:
                    block.flat.mul_(factor)
            self._shrunk = factors

    def _copy(self, values: Mapping[int, Tensor]) -> None:
        with torch.no_grad(), _uninterrupted():
            for index, value in values.items():
                self.blocks[index].tensor.detach().copy_(value)

    def _walk(
        self,
        direction: Direction,
        walks: Sequence[Sequence[float]],
        away: tuple[Direction, float] | None,
        added: tuple[Direction, tuple[float, ...]] | None = None,
    ) -> None:
        """One traversal of all blocks: add ``walk[b] * u_b`` for each walk in turn, then note where theta stands."""
        unit = direction.factor / standard_deviation(direction.distribution)
        # Every scale is computed, and so checked, before any block moves.
        scales = [
            [round_scale(walk[i] * sigma * unit, block.tensor.dtype) for walk in walks]
            for i, (block, sigma) in enumerate(zip(self.blocks, direction.sigma, strict=True))
        ]
        with torch.no_grad(), _uninterrupted():
            for block, wanted in zip(self.blocks, scales, strict=True):
                if any(wanted):
                    add_noise_(block.flat, block.name, direction.key, wanted, direction.distribution)
            self._away = away
            if added is not None:
                self._added.append(added)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the traversal is done: half a traversal could not be undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[object] = []
    previous = signal.signal(signal.SIGINT, lambda _signal, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        if arrived:
            signal.raise_signal(signal.SIGINT)
