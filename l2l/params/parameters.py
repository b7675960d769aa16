"""The parameters of a model, their perturbation, and the updates that are still to be written into memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, final

import torch
from torch.utils.hooks import RemovableHandle

from l2l.interrupts import complete, defer_interrupt, raise_deferred
from l2l.models.offload import stream_of
from l2l.noise import round_scale
from l2l.params.blocks import Blocks
from l2l.params.direction import Basis, Direction, Move
from l2l.params.engine import Moments, Perturbation
from l2l.params.functional import HALF, FunctionalEngine, PerturbEngine
from l2l.params.in_place import InPlaceEngine
from l2l.params.shards import check_agreement, reshard


@dataclass(frozen=True)
class Displacement:
    """Difference between the memory of the parameters and theta: none, except inside a step or between fused steps."""

    direction: Direction | None
    """Memory holds theta + distance * u of this direction, without the pending moves."""
    distance: float
    pending: tuple[Move, ...]
    """Moves that belong to theta and are made in the next traversal."""

    @property
    def restored(self) -> bool:
        """Whether the parameters hold exactly theta."""
        return self.direction is None and not self.pending


_fused: "list[PerturbedParameters]" = []
"""Inside :meth:`PerturbedParameters.fused_steps`, and perturbed in memory between steps."""
Value = TypeVar("Value")
Change: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
"""(index of a block, a delta of it) -> what is added instead; a new tensor, or the delta itself unchanged."""


@final
class PerturbedParameters:
    """Parameters theta, perturbed by ``distance * u`` along one direction at a time, and moved along directions.

    Whatever is raised inside :meth:`step`, theta is back where the step began when it leaves: bit for bit with
    ``functional``; with ``in_place`` within one rounding per traversal, and one more along a basis. From :meth:`final` on a
    step is made whatever happens, and what arrives waits until it is counted.

    Args:
        perturb: ``in_place`` (float32 and float64 only), ``functional`` (evaluations read perturbed copies), or ``auto``:
            functional where a block is of half precision, or the model is offloaded.
        update: how half-precision weights take an update: ``master`` (a float32 copy) or ``stochastic`` rounding.
        sparse_embeddings: perturb and update only those rows of embeddings that an evaluation looks up. The others
            have gradient zero, so losses and projected gradients are the same numbers.

    Raises:
        ValueError: in-place perturbation is asked for half-precision weights, sparse embeddings where there is none, or
            anything but in-place perturbation in float32 for sharded blocks (DTensors).
    """

    def __init__(
        self,
        blocks: Blocks,
        perturb: Literal["auto", "in_place", "functional"] = "auto",
        update: Literal["master", "stochastic"] = "master",
        sparse_embeddings: bool = False,
    ) -> None:
        half = next((block for block in blocks if block.tensor.dtype in HALF), None)
        if perturb == "in_place" and half is not None:
            raise ValueError(
                f"perturb='in_place', but block {half.name!r} is {half.tensor.dtype}: half-precision weights drift "
                "when they are perturbed in place; use perturb='functional' or load the model with dtype float32"
            )
        empty = next((block for block in blocks if block.tensor.is_meta), None)
        if empty is not None:
            raise ValueError(
                f"block {empty.name!r} has no memory: a device_map has put it into the host's memory or on disk, from where it "
                "is read and not written; load the model with l2l.load_model(..., offload=True), or train other layers"
            )
        offloaded = stream_of(blocks.model) is not None
        if offloaded and perturb == "in_place":
            raise ValueError(
                "perturb='in_place', but the model is offloaded, and its layers are perturbed as copies on the device: leave "
                "perturb at auto, or offload off"
            )
        shard = blocks.sharded
        if shard is not None and (half is not None or perturb == "functional" or sparse_embeddings):
            raise ValueError(
                f"block {shard.name!r} is sharded, and shards are moved where they lie, in float32: load the model in float32 "
                "with perturb='in_place' and sparse_embeddings off; to compute in half precision, pass "
                "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16) to fully_shard"
            )
        if perturb not in ("auto", "in_place", "functional"):
            raise ValueError(f"perturb={perturb!r} must be 'auto', 'in_place' or 'functional'")
        if update not in ("master", "stochastic"):
            raise ValueError(f"update={update!r} must be 'master' or 'stochastic'")
        sparse = [i for i, block in enumerate(blocks) if block.embedding] if sparse_embeddings else []
        if sparse_embeddings and not sparse:
            raise ValueError("sparse_embeddings is set, but no embedding is trained: leave it off")
        self.blocks = blocks
        self.mode: Literal["in_place", "functional"] = (
            "functional" if perturb == "functional" or half is not None or offloaded else "in_place"
        )
        self.update = None if half is None else update
        self._engine: PerturbEngine = (
            FunctionalEngine(blocks, update, sparse) if self.mode == "functional" else InPlaceEngine(blocks, sparse)
        )
        self._sparse = sparse_embeddings
        self._at: Perturbation | None = None
        self._pending: list[Move] = []
        self._added: list[Move] = []
        self._rows: dict[int, torch.Tensor] = {}
        self._late: list[object] = []
        self._finality: ExitStack | None = None
        self._undo: Callable[[], None] | None = None
        self._shrunk: tuple[float, ...] | None = None
        self._inside = self._fused = False
        self._basis: Basis | None = None  # the last that was checked
        self._transform: Change = lambda _, delta: delta

    @property
    def displacement(self) -> Displacement:
        """Difference between memory and theta now."""
        at = self._at
        return Displacement(at and at.direction, at.distance if at else 0.0, tuple(self._pending))

    def perturb(self, direction: Direction, distance: float) -> None:
        """From now on evaluations see ``theta + distance * u``."""
        at = Perturbation(direction, distance)
        self._check(at.move(len(self.blocks)))
        with defer_interrupt():  # memory and displacement change together
            self._engine.perturb(at, self._pending)
            self._pending, self._at = [], at

    def unperturb(self) -> None:
        """From now on evaluations see theta. For anything else that reads the parameters, :meth:`restore` them.

        Raises:
            RuntimeError: weights were written while they were perturbed; what they hold now is neither.
        """
        written = self._engine.written()
        with defer_interrupt():
            self._engine.perturb(None, self._pending)
            self._pending, self._at = [], None
        if written is not None:
            raise RuntimeError(
                f"block {written!r} was written while the weights were perturbed, inside fused_steps(): call "
                "optimizer.theta.restore() before writing weights, and write these again"
            )

    def restore(self) -> None:
        """Restore the unperturbed weights and apply pending moves: the parameters hold exactly theta."""
        self.unperturb()
        with defer_interrupt():
            self._engine.settle()

    def defer_writes(self) -> None:
        """For a replay, whose losses are known: from now on the parameters are written only where something reads them."""
        self._engine.wait()

    def _check(self, move: Move) -> None:
        """Refuse a move that could not be made whole, before any block moves."""
        if not move.direction.only_noise:
            self.check_whole("a direction along a basis or an operator")
        basis = move.direction.basis
        if basis is not None and basis is not self._basis:
            basis.check(self.blocks)
            self._basis = basis
        round_scale(sum(map(abs, move.direction.scales(move.amounts))), torch.float32)  # raises where it is not finite
        if move.direction.along_basis:
            round_scale(sum(abs(move.basis_scale(i)) for i in range(len(move.amounts))), torch.float32)

    def check_whole(self, what: str) -> None:
        """Raise ValueError where processes hold parts of blocks: all they can do is to move along noise."""
        if (shard := self.blocks.sharded) is not None:
            raise ValueError(
                f"{what} needs whole blocks, and each process holds a part of block {shard.name!r}: use a method that moves "
                "along noise alone, as mezo, fzoo and learned do, or leave the model unsharded"
            )

    def add(self, direction: Direction, amounts: Sequence[float]) -> None:
        """Move theta by ``amounts[b] * u_b``. Inside a step the move is pending until the next traversal, and part of it."""
        for i, rows in self._engine.touched().items():
            self._rows[i] = torch.unique(torch.cat([rows, *([self._rows[i]] if i in self._rows else [])]))
        move = Move(direction, tuple(amounts), dict(self._rows))
        self._check(move)
        self._pending.append(move)
        self._added.append(move)
        if not self._inside:
            self.restore()

    def evaluate(self, closure: Callable[[], Value]) -> Value:
        """The closure's value at the perturbed weights.

        Raises:
            RuntimeError: blocks are sharded, and the processes that hold them see different values.
        """
        if self.blocks.sharded is None:
            with self._engine.evaluating():
                return closure()
        try:
            with self._engine.evaluating():
                value = closure()
        finally:
            reshard(self.blocks.model)  # what a module has gathered is of these weights, not of the next
        values = value if isinstance(value, tuple) else (value,)
        check_agreement([torch.as_tensor(one) for one in values])
        return value

    def moments(self, direction: Direction) -> Moments:
        """(mean, unbiased variance) of each block of the unperturbed weights after pending moves.

        In closed form where the last evaluations were at both sides along ``direction`` and it has a centre and neither basis
        nor operator; else measured by a traversal.
        """
        found = self._engine.moments(direction, self._pending)
        if found is None:
            self.restore()
            found = self._engine.moments(direction, [])
            assert found is not None, "unperturbed weights can always be measured"
        return found

    def value(self, index: int) -> torch.Tensor:
        """The weights of a block as precisely as they are kept, sharing memory with them. Call :meth:`restore` before."""
        return self._engine.value(index)

    def shrink(self, factors: Sequence[float]) -> None:
        """Multiply each block by its factor (weight decay). Once in a step, and last: the step is final with it.

        Raises:
            ValueError: a factor is not positive; no block has moved then.
        """
        check_factors(factors)
        self._finish()
        self._multiply(tuple(factors))

    def add_dense(self, deltas: Mapping[int, torch.Tensor], scale: float) -> None:
        """Add ``scale * delta`` to the blocks listed: a first-order step. The step is final with it."""
        self._shift(deltas.__getitem__, dict.fromkeys(deltas, scale))

    def add_dense_each(self, delta: Callable[[int], torch.Tensor], scales: Sequence[float] | Mapping[int, float]) -> None:
        """Add ``scales[b] * delta(b)`` to each block, one after the other: a step that lies along no direction.

        ``delta`` is called with the index of a block, at the unperturbed weights, and again where it has raised; so what it
        changes of a method's state it changes once nothing can fail any more. The step is final with the first block.

        Raises:
            ValueError: embeddings are sparse: such a step has no rows.
        """
        if self._engine.touched():
            raise ValueError("sparse_embeddings needs a method that moves along its directions: leave it off")
        self._shift(delta, scales if isinstance(scales, Mapping) else dict(enumerate(scales)))

    def _shift(self, delta: Callable[[int], torch.Tensor], scales: Mapping[int, float]) -> None:
        made: dict[int, torch.Tensor] = {}  # of the present block: whatever fails after it, it is not asked for again

        def moved(weights: torch.Tensor, index: int, by: float) -> torch.Tensor:
            if index not in made:
                made.clear()
                made[index] = delta(index)
            return weights.add_(self._transform(index, made[index]), alpha=by)

        self.check_whole("a step that is no move along directions")
        self.restore()
        self.final()
        self._rewrite({i: lambda w, i=i, by=by: moved(w, i, by) for i, by in scales.items()})

    @contextmanager
    def transform_dense_updates(self, change: Change) -> Iterator[None]:
        """Inside, what :meth:`add_dense` and :meth:`add_dense_each` add to a block is ``change(index, delta)``."""
        outer, self._transform = self._transform, lambda index, delta: outer(index, change(index, delta))
        try:
            yield
        finally:
            self._transform = outer

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set every block to the tensor of its name: what a checkpoint holds.

        Raises:
            ValueError: names or shapes are not those of the blocks; nothing is set then.
        """
        shapes = {block.name: tuple(block.tensor.shape) for block in self.blocks}
        given = {name: tuple(value.shape) for name, value in values.items()}
        if shapes != given:
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise ValueError(f"these weights are of another model: {len(wrong)} blocks differ, the first is {wrong[0]!r}")
        self._copy({index: values[block.name] for index, block in enumerate(self.blocks)})

    def interpolate(
        self, anchor: Mapping[int, torch.Tensor], here: Mapping[int, torch.Tensor], ratios: Mapping[int, float]
    ) -> None:
        """Set block i to ``anchor + ratio * (here - anchor)``, for the blocks listed; ratio 1 is ``here``, bit for bit.

        Until the step ends, an error puts ``here`` back first.
        """
        self.check_whole("a projection")
        self.restore()
        self._undo = lambda: self._copy(here)
        self._rewrite(
            {
                i: lambda w, i=i, by=by: torch.lerp(anchor[i].to(w.dtype), here[i].to(w.dtype), by, out=w)
                for i, by in ratios.items()
            }
        )

    @contextmanager
    def step(self) -> "Iterator[PerturbedParameters]":
        """One step: afterwards the parameters hold theta; after an error, theta as it was when the step began.

        Inside :meth:`fused_steps` the step's moves may stay pending until the next evaluation or :meth:`restore`.

        Raises:
            RuntimeError: other parameters of the model are inside :meth:`fused_steps`, or its weights were written there.
        """
        self.raise_deferred_interrupt()
        self._check_alone()
        if self._engine.written() is not None:
            self.restore()  # raises
        outer = self._finality
        with ExitStack() as own:
            try:
                self._finality = outer or own
                self._begin(inside=True)
                self._engine.begin()
                self._engine.touched()  # rows that a step which failed had looked up are not this step's
                yield self
                self.final()
                if not self._fused or self.mode == "functional":
                    self._finish()
            except BaseException:
                with defer_interrupt():  # a second Ctrl-C waits as well
                    self._roll_back()
                    self._inside = False
                    self.restore()
                raise
            finally:
                self._begin(inside=False)
                self._engine.finish()
                self._finality = outer

    @contextmanager
    def until_counted(self) -> Iterator[None]:
        """Around a step and its recording: what a final step held back is raised when both are done."""
        try:
            with ExitStack() as self._finality:
                yield
        finally:
            self._finality = None
        self.raise_deferred_interrupt()

    def final(self) -> None:
        """From here on the step is made whatever happens: interrupts, and errors of its writes, wait until it is counted."""
        if self._finality is not None:
            self._finality.enter_context(defer_interrupt(self._late))

    def _begin(self, inside: bool) -> None:
        self._added, self._undo, self._shrunk, self._rows, self._inside = [], None, None, {}, inside

    def _finish(self) -> None:
        """Make the step final, and write it."""
        self.final()
        with defer_interrupt(self._late):
            complete([lambda: self._engine.commit(self._pending, self._fused)])
            self._pending, self._at = [], None
            self._engine.finish()

    def raise_deferred_interrupt(self) -> None:
        """Raise an interrupt that was deferred until the step had been recorded."""
        raise_deferred(self._late)

    @contextmanager
    def fused_steps(self) -> "Iterator[PerturbedParameters]":
        """A loop that owns the model: between its steps the parameters need not hold theta, which saves a traversal.

        Losses and weights are those of separate steps, bit for bit (along a basis, within the roundings of each traversal).
        Afterwards the parameters hold theta. ``state_dict()`` of the model and its modules restores them before it reads.
        Call :meth:`restore` before anything else reads or writes the model (evaluation, ``copy.deepcopy``, loading).

        Raises:
            RuntimeError: another optimizer is inside its fused steps on the same model; or, at the next step or at the end,
                weights were written while they were perturbed.
        """
        self._check_alone()
        outer, self._fused = self._fused, True
        hooks = [] if outer or not self._engine.lazy or self.blocks.model is None else self._guard(self.blocks.model)
        if self.mode == "in_place":
            _fused.append(self)
        try:
            yield self
        finally:
            self._fused = outer
            if self.mode == "in_place":
                _fused.remove(self)
            for hook in hooks:
                hook.remove()
            self.restore()
        self.raise_deferred_interrupt()

    def _guard(self, model: torch.nn.Module) -> list[RemovableHandle]:
        """Restore the weights before a ``state_dict`` of the model, or of a part of it, is taken."""

        def restored(*_: object) -> None:
            if self._inside:
                raise RuntimeError("state_dict() inside a closure would hold perturbed weights: take it between steps")
            self.restore()

        return [module.register_state_dict_pre_hook(restored) for module in model.modules()]

    def _check_alone(self) -> None:
        for other in (one for one in _fused if one is not self):
            model, places = self.blocks.model, {block.tensor.data_ptr() for block in self.blocks}
            same = model is not None and other.blocks.model is model
            if same or any(block.tensor.data_ptr() in places for block in other.blocks):
                raise RuntimeError(
                    "another optimizer is inside fused_steps() on this model, and its weights are perturbed between steps: "
                    "leave the fused_steps() of one before the other steps, or let one optimizer train all blocks"
                )

    def __getstate__(self) -> dict[str, Any]:
        if self._fused:
            raise RuntimeError("weights are perturbed inside fused_steps(): copy or pickle the optimizer outside of it")
        choices = {"perturb": self.mode, "update": self.update or "master", "sparse_embeddings": self._sparse}
        return {"blocks": self.blocks, **choices, "extra": self.extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extra = state.pop("extra")
        self.__init__(**state)
        self.load_extra_state(extra)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Tensors by block name that resuming needs beside the model's weights: float32 masters. Restores theta."""
        self.restore()
        return self._engine.extra_state()

    def check_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless :meth:`load_extra_state` takes the state; nothing changes."""
        self._engine.check_extra_state(state)

    def load_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from :meth:`extra_state`.

        Raises:
            ValueError: it was saved with another choice of perturb or update.
        """
        self.restore()
        self._engine.load_extra_state(state)

    def _roll_back(self) -> None:
        if self._shrunk is not None:
            self._multiply(tuple(1 / factor for factor in self._shrunk))
        if self._undo is not None:
            self._undo()
        made = [move for move in self._added if all(move is not waiting for waiting in self._pending)]
        self._pending = [move for move in self._pending if all(move is not added for added in self._added)]
        self._engine.revert(made)
        self._at = None

    def _multiply(self, factors: tuple[float, ...]) -> None:
        with defer_interrupt():
            self._rewrite({i: lambda w, f=factor: w.mul_(f) for i, factor in enumerate(factors) if factor != 1.0})
            self._shrunk = factors

    def _copy(self, values: Mapping[int, torch.Tensor]) -> None:
        self._rewrite({i: lambda w, v=value: w.copy_(v) for i, value in values.items()})

    def _rewrite(self, changes: Mapping[int, Callable[[torch.Tensor], object]]) -> None:
        """Write blocks otherwise than along a direction, from the unperturbed weights."""
        self.restore()
        with torch.no_grad(), defer_interrupt():
            complete(partial(self._engine.rewrite, index, change) for index, change in changes.items())


def check_factors(factors: Sequence[float]) -> None:
    """Raise ValueError, naming the first factor of weight decay that is not positive."""
    wrong = [factor for factor in factors if not factor > 0]
    if wrong:
        raise ValueError(f"weights would shrink by the factor {wrong[0]}: lr * weight_decay must be below 1")
