"""The only code that moves parameters: looking along a direction, stepping along it, coming back.

Two ways of walking under one contract. *In place* (float32): the stored weights are perturbed and brought back, within
one rounding per walk and with the same bits in every run. *Exact*: the stored weights are never perturbed; whatever
reads a parameter during an evaluation is given a transient copy that is.
"""

from l2l.perturb.basis import Basis
from l2l.perturb.direction import Direction, Move
from l2l.perturb.shape import DirectionOperator
from l2l.perturb.theta import Journal, PerturbedParameters
from l2l.perturb.written import dense_direction

__all__ = ["Basis", "Direction", "Journal", "Move", "DirectionOperator", "PerturbedParameters", "dense_direction"]
