"""The only code that moves parameters: perturbing them along a direction, updating them, restoring them.

Two engines under one contract. *In place* (float32): the stored weights are perturbed and brought back, within one
rounding per traversal and with the same bits in every run. *Functional*: the stored weights are never perturbed;
evaluations read perturbed copies instead."""

from l2l.params.blocks import Block, Blocks
from l2l.params.direction import Basis, Direction, DirectionOperator, Move
from l2l.params.engine import dense_direction
from l2l.params.parameters import Displacement, PerturbedParameters

__all__ = [
    "Basis",
    "Block",
    "Blocks",
    "Direction",
    "DirectionOperator",
    "Displacement",
    "Move",
    "PerturbedParameters",
    "dense_direction",
]
