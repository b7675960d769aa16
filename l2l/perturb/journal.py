"""What is left to do before the parameters are theta again."""

from __future__ import annotations

from dataclasses import dataclass

from l2l.perturb.direction import Direction, Move


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
