"""Zeroth-order steps on several ranks: what they tell each other is losses, never weights or gradients.

- :mod:`l2l.parallel.ranks`: who takes part, and the key-value store through which messages go (:class:`Ranks`).
- :mod:`l2l.parallel.data`: a batch in pieces, each evaluated by one rank (:class:`DataParallel`), for any closure and method.
- :mod:`l2l.parallel.population`: the directions of a step, each evaluated by one worker. Its functions know no transport.
- :mod:`l2l.parallel.values`: what closures return, as bytes.
"""

from l2l.parallel.data import DataParallel as DataParallel
from l2l.parallel.ranks import Ranks as Ranks
from l2l.parallel.ranks import ranks_of_environment as ranks_of_environment
