"""MeZO: SGD along random directions, in the memory of inference.

Malladi et al. 2023, arXiv:2305.17333, Algorithm 1 (Algorithm 2 with several directions): with z standard noise,
g = (L(theta + epsilon z) - L(theta - epsilon z)) / (2 epsilon) and theta -= lr * g * z. The defaults of
:class:`l2l.methods.base.Method` are this method. Differs from the paper in keying the noise by block name and element, not
by a global seed, so that frozen or reordered parameters cannot shift the stream.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from l2l.methods import base


@final
@dataclass(frozen=True)
class MeZO(base.Method[None]):
    """theta -= lr * g * z with z of unit variance in every coordinate."""

    info: ClassVar = base.MethodInfo("Malladi et al. 2023, arXiv:2305.17333, Algorithm 1")
