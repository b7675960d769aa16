"""The only code that moves parameters: looking along a direction, stepping along it, coming back.

Two ways of walking under one contract. *In place* (float32): the stored weights are perturbed and brought back, within
one rounding per walk and with the same bits in every run. *Exact*: the stored weights are never perturbed; whatever
reads a parameter during an evaluation is given a transient copy that is."""

from l2l.params.basis import Basis
from l2l.params.direction import Direction, DirectionOperator, Move
from l2l.params.engine import dense_direction
from l2l.params.parameters import Journal, PerturbedParameters

__all__ = ["Basis", "Direction", "DirectionOperator", "Journal", "Move", "PerturbedParameters", "dense_direction"]
