"""What is left to do before the parameters are theta again.

The parameters and where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, TypeVar, final

import torch
from torch import Tensor

from l2l.params.basis import Basis
from l2l.params.blocks import Blocks
from l2l.params.direction import Direction, Move
from l2l.params.engine import Moments, Perturbation, PerturbEngine, check_finite, defer_interrupt, raise_deferred
from l2l.params.functional import FunctionalEngine, check_perturb_mode
from l2l.params.in_place import InPlaceEngine


@dataclass(frozen=True)
class Journal:
    """What separates the memory of the parameters from theta. Nothing does, except inside a step or a managed loop."""

    direction: Direction | None
    """Memory stands at theta + distance * u of this direction, the waiting moves not yet made."""
    distance: float
    waiting: tuple[Move, ...]
    """Moves that belong to theta and are made together with the next look."""

    @property
    def home(self) -> bool:
        """Whether the parameters hold exactly theta."""
        return self.direction is None and not self.waiting


Value = TypeVar("Value")
Change: TypeAlias = Callable[[int, Tensor], Tensor]
"""(index of a block, a delta of it) -> what is added instead; a new tensor, or the delta itself unchanged."""


@final
class PerturbedParameters:
    """The parameters and where they stand: at home, or at some distance along one direction.

    Whatever is raised inside :meth:`step`, theta is back where the step began when it leaves: bit for bit when walking
    exactly, within one rounding per walk in place, and one more where the walk is along a basis.

    Args:
        walk: ``in_place`` (float32 and float64 only), ``exact``, or ``auto``: exact where a block is of half precision.
        update: how half-precision weights take an update: ``master`` (a float32 copy) or ``stochastic`` rounding.
        sparse_embeddings: perturb and update only those rows of embeddings that an evaluation looks up. The others
            have gradient zero, so losses and projected gradients are the same numbers.

    Raises:
        ValueError: in-place walking is asked for half-precision weights, or sparse embeddings where there is none.
    """

    def __init__(
        self,
        blocks: Blocks,
        perturb: Literal["auto", "in_place", "functional"] = "auto",
        update: Literal["master", "stochastic"] = "master",
        sparse_embeddings: bool = False,
    ) -> None:
        half = check_perturb_mode(blocks, perturb, update)
        sparse = [i for i, block in enumerate(blocks) if block.embedding] if sparse_embeddings else []
        if sparse_embeddings and not sparse:
            raise ValueError("sparse_embeddings is set, but no embedding is trained: leave it off")
        exact = perturb == "functional" or half
        self.blocks = blocks
        self.mode: Literal["in_place", "functional"] = "functional" if exact else "in_place"
        self.update = update if half else None
        self._walker: PerturbEngine = (
            FunctionalEngine(blocks, update, sparse) if exact else InPlaceEngine(blocks, sparse)
        )
        self._away: Perturbation | None = None
        self._pending: list[Move] = []
        self._added: list[Move] = []
        self._rows: dict[int, Tensor] = {}
        self._late: list[object] = []
        self._undo: Callable[[], None] | None = None
        self._shrunk: tuple[float, ...] | None = None
        self._inside = self._managed = False
        self._basis: Basis | None = None  # the last that was checked
        self._through: Change = lambda _, delta: delta

    @property
    def journal(self) -> Journal:
        """What stands between memory and theta now."""
        away = self._away
        return Journal(away and away.direction, away.distance if away else 0.0, tuple(self._pending))

    def perturb(self, direction: Direction, distance: float) -> None:
        """Stand at ``home + distance * u``."""
        wanted = Perturbation(direction, distance)
        self._check([wanted.move(len(self.blocks))])
        self._stand(wanted)

    def _check(self, moves: Sequence[Move]) -> None:
        """Refuse a move that could not be made whole, before any block moves."""
        for move in moves:
            basis = move.direction.basis
            if basis is not None and basis is not self._basis:
                basis.check(self.blocks)
                self._basis = basis
        check_finite(moves)

    def restore(self) -> None:
        """Stand where no look was ever taken, with every move made: the parameters hold exactly theta."""
        self._stand(None)

    def _stand(self, look: Perturbation | None) -> None:
        with defer_interrupt():  # memory and journal change together
            self._walker.stand(look, self._pending)
            self._pending, self._away = [], look

    def add(self, direction: Direction, amounts: Sequence[float]) -> None:
        """Move home by ``amounts[b] * u_b``. Inside a step the move waits for the next traversal, and is part of it."""
        for i, rows in self._walker.touched().items():
            self._rows[i] = torch.unique(torch.cat([rows, *([self._rows[i]] if i in self._rows else [])]))
        move = Move(direction, tuple(amounts), dict(self._rows))
        self._check([move])
        self._pending.append(move)
        self._added.append(move)
        if not self._inside:
            self.restore()

    def evaluate(self, closure: Callable[[], Value]) -> Value:
        """The closure's value where theta stands."""
        with self._walker.evaluating():
            return closure()

    def moments(self, direction: Direction) -> Moments:
        """(mean, unbiased variance) of each block at home, the waiting moves made.

        In closed form where the last looks were along ``direction`` and it has a centre and no basis; else by a traversal.
        """
        found = self._walker.moments(direction, self._pending)
        if found is None:
            self.restore()
            found = self._walker.moments(direction, [])
            assert found is not None, "measured at home"
        return found

    def value(self, index: int) -> Tensor:
        """The weights of a block as precisely as they are kept, sharing memory with them. Call :meth:`home` before."""
        return self._walker.value(index)

    def shrink(self, factors: Sequence[float]) -> None:
        """Multiply each block by its factor (weight decay). Once in a step, and last: the step is final with it.

        Raises:
            ValueError: a factor is not positive; no block has moved then.
        """
        wrong = [factor for factor in factors if not factor > 0]
        if wrong:
            raise ValueError(f"weights would shrink by the factor {wrong[0]}: lr * weight_decay must be below 1")
        with defer_interrupt(self._late):
            self._finish()
            self._multiply(tuple(factors))

    def add_dense(self, deltas: Mapping[int, Tensor], scale: float) -> None:
        """Add ``scale * delta`` to the blocks listed: a first-order step. Not undone."""
        self._shift(deltas.__getitem__, dict.fromkeys(deltas, scale))

    def add_dense_each(self, delta: Callable[[int], Tensor], scales: Sequence[float]) -> None:
        """Add ``scales[b] * delta(b)`` to each block, one after the other: a step that lies along no direction.

        ``delta`` is called once per block, at home, with the block's index; what it changes of a method's state changes
        together with the weights: an interrupt waits. Not undone.

        Raises:
            ValueError: embeddings are sparse: such a step knows nothing of rows.
        """
        if self._walker.touched():
            raise ValueError("sparse_embeddings needs a method that moves along its directions: leave it off")
        self._shift(delta, dict(enumerate(scales)))

    def _shift(self, delta: Callable[[int], Tensor], scales: Mapping[int, float]) -> None:
        self._rewrite(
            {i: lambda w, i=i, by=by: w.add_(self._through(i, delta(i)), alpha=by) for i, by in scales.items()}
        )

    @contextmanager
    def transform_dense_updates(self, change: Change) -> Iterator[None]:
        """Inside, what :meth:`shift` and :meth:`shift_each` add to a block is ``change(index, delta)``."""
        outer, self._through = self._through, lambda index, delta: outer(index, change(index, delta))
        try:
            yield
        finally:
            self._through = outer

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
        self._copy({index: values[block.name] for index, block in enumerate(self.blocks)})

    def interpolate(
        self, anchor: Mapping[int, Tensor], here: Mapping[int, Tensor], ratios: Mapping[int, float]
    ) -> None:
        """Set block i to ``anchor + ratio * (here - anchor)``, for the blocks listed; ratio 1 is ``here``, bit for bit.

        Until the step ends, an error puts ``here`` back first.
        """
        self.restore()
        self._undo = lambda: self._copy(here)

        def between(w: Tensor, index: int) -> Tensor:
            return torch.lerp(anchor[index].to(w.dtype), here[index].to(w.dtype), ratios[index], out=w)

        self._rewrite({i: partial(between, index=i) for i in ratios})

    @contextmanager
    def step(self) -> Iterator[PerturbedParameters]:
        """One step: on the way out theta is home; after an error it is back where the step began.

        In a managed loop the step's moves may wait until the next look, or until :meth:`home` is called.
        """
        self.raise_deferred_interrupt()
        self._begin()
        try:
            self._walker.begin()
            self._walker.touched()  # rows that a step which failed had looked up are not this step's
            yield self
        except BaseException:
            with defer_interrupt():  # a second Ctrl-C waits as well
                self._roll_back()
                self._inside = False
                self.restore()
            raise
        else:
            if not self._managed or self.mode == "functional":
                self._finish()
        finally:
            self._begin(inside=False)
            self._walker.finish()

    def _finish(self) -> None:
        """Home for good: the step is done, and an interrupt that arrives meanwhile waits for :meth:`deliver`."""
        with defer_interrupt(self._late):
            self._walker.commit(self._pending, undoable=False)
            self._pending, self._away = [], None
            self._walker.finish()

    def raise_deferred_interrupt(self) -> None:
        """Let an interrupt through that arrived while a step was being made final: whoever counts steps has counted it."""
        raise_deferred(self._late)

    def _begin(self, inside: bool = True) -> None:
        self._added, self._undo, self._shrunk, self._rows, self._inside = [], None, None, {}, inside

    @contextmanager
    def fused_steps(self) -> Iterator[PerturbedParameters]:
        """A loop that owns the model: between its steps the parameters need not hold theta, which saves a traversal.

        Whatever reads or writes the model in the meantime (evaluation, saving) calls :meth:`home` first. The
        losses and weights are those of unmanaged steps, bit for bit (along a basis, within the roundings of each walk).
        On the way out theta is home.
        """
        outer, self._managed = self._managed, True
        try:
            yield self
        finally:
            self._managed = outer
            self.restore()
        self.raise_deferred_interrupt()

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors by block name that resuming needs beside the model's weights: float32 masters. Theta goes home."""
        self.restore()
        return self._walker.extra_state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`extra_state`.

        Raises:
            ValueError: it belongs to another way of walking or updating.
        """
        self.restore()
        self._walker.load_extra_state(state)

    def _roll_back(self) -> None:
        if self._shrunk is not None:
            self._multiply(tuple(1 / factor for factor in self._shrunk))
        if self._undo is not None:
            self._undo()
        made = [move for move in self._added if all(move is not waiting for waiting in self._pending)]
        self._pending = [move for move in self._pending if all(move is not added for added in self._added)]
        self._walker.revert(made)
        self._away = None

    def _multiply(self, factors: tuple[float, ...]) -> None:
        with defer_interrupt():
            self._rewrite({i: lambda w, f=factor: w.mul_(f) for i, factor in enumerate(factors) if factor != 1.0})
            self._shrunk = factors

    def _copy(self, values: Mapping[int, Tensor]) -> None:
        self._rewrite({i: lambda w, v=value: w.copy_(v) for i, value in values.items()})

    def _rewrite(self, changes: Mapping[int, Callable[[Tensor], object]]) -> None:
        """Write blocks otherwise than along a direction, from home."""
        self.restore()
        with torch.no_grad(), defer_interrupt():
            for index, change in changes.items():
                self._walker.rewrite(index, change)
