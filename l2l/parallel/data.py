"""Data parallel: a batch in pieces, each evaluated by one rank; what is exchanged is what the pieces gave.

Every rank has the same weights, takes the same key and gets the values of all pieces, in their order; so every rank makes the
same step, to the last bit, and weights need not travel. As it is the closure that is shared, all methods that read no more of a
batch than closures return work unchanged: searches and line searches, curvature, logits. The mean of a batch is that of
:class:`l2l.estimators.MicroBatched`, piece by piece in order: one process that evaluates the same pieces has the same bits.
"""

from collections.abc import Sequence
from typing import final

import torch

from l2l.estimators import Closure, ClosureValue, MicroBatched
from l2l.optim import ZOOptimizer
from l2l.parallel.ranks import Ranks
from l2l.parallel.values import pack, share, unpack
from l2l.params.blocks import tensors_hash


@final
class DataParallel:
    """Shares closures between ranks. All ranks must make the same calls in the same order.

    In a loop of one's own, with a process group made by ``torchrun``, Lightning Fabric or accelerate::

        shared = DataParallel(ranks_of_environment())
        loss = optimizer.step(shared.shard(lambda: model(**my_part_of_the_batch).loss))

    Args:
        device: where exchanged values are put; that of the model gives the bits of one process.
    """

    def __init__(self, ranks: Ranks, device: torch.device | str = "cpu") -> None:
        self.ranks, self.device = ranks, device
        self._step, self._calls = -1, 0
        self._now: list[str] = []
        self._before: list[str] = []  # keys of this rank that are forgotten when all have begun the next step

    def begin(self, step: int) -> None:
        """Begin a step: its messages are counted from 0, so that a rank that begins it again sends the same ones."""
        self._before += self._now
        self._step, self._calls, self._now = step, 0, []

    def exchange(self, own: bytes, kind: str = "step") -> list[bytes]:
        """What each rank gives at this place, in the order of ranks; ``kind``: as what its bytes are counted.

        Raises:
            RankError: see :meth:`Ranks.collect`.
        """
        ranks, place = self.ranks, f"{self._step}.{self._calls}"
        self._calls += 1
        ranks.post(f"{place}.{ranks.rank}", own, kind)
        self._now.append(f"{place}.{ranks.rank}")
        found = [own if r == ranks.rank else ranks.collect(f"{place}.{r}", r) for r in range(ranks.size)]
        ranks.delete(self._before)  # all have sent something of this step, and so have read all of the one before
        self._before = []
        return found

    def joint(self, closure: Closure) -> Closure:
        """A closure that all ranks have: each evaluates its part of the pieces. One that is not in pieces is rank 0's."""
        split = closure if isinstance(closure, MicroBatched) else MicroBatched((closure,))
        ranks, count = self.ranks, len(split.pieces)

        def shared() -> ClosureValue:
            mine = [split.pieces[i]() for i in share(count, ranks.rank, ranks.size)]
            values = [value for content in self.exchange(pack(mine)) for value in unpack(content, self.device)]
            if len(values) != count:
                raise ValueError(f"the ranks sent {len(values)} values of {count} pieces: run the same program on all ranks")
            whole = MicroBatched(tuple(lambda value=value: value for value in values), split.weights)()
            # A float says that there is no way from it back to this rank's model (PseuZO looks for one); its bits are the same.
            return whole.item() if isinstance(whole, torch.Tensor) and whole.ndim == 0 else whole

        return shared

    def shard(self, closure: Closure, weights: Sequence[float] | None = None) -> Closure:
        """A closure of this rank's part of a batch, for one step of a loop of one's own: the loss is the weighted sum of all
        ranks' losses; of logits or losses per example, all of them in the order of ranks.

        Args:
            weights: share of each rank's part in the loss, [ranks]; None: all alike.

        Raises:
            ValueError: there are not as many weights as ranks.
        """
        size = self.ranks.size
        weights = [1 / size] * size if weights is None else weights
        if len(weights) != size:
            raise ValueError(f"{len(weights)} weights for {size} ranks: give one for each")
        self.begin(self._step + 1)
        return self.joint(MicroBatched((closure,) * size, tuple(weights)))  # of the pieces, this rank evaluates its own

    def compare(self, optimizer: ZOOptimizer) -> None:
        """Compare the weights of all ranks, to the last bit. Restores theta.

        Raises:
            ValueError: they differ; the message names the step and the ranks.
        """
        raise_where_different(self.exchange(checksum(optimizer), "checksum"), optimizer.steps_done)


CHECKSUM = 8
"""Bytes of :func:`checksum`."""


def checksum(optimizer: ZOOptimizer) -> bytes:
    """Of all bits of the trained weights. Restores theta."""
    optimizer.theta.restore()
    return bytes.fromhex(tensors_hash(block.tensor for block in optimizer.blocks))[:CHECKSUM]


def raise_where_different(checksums: Sequence[bytes], step: int) -> None:
    """Raise ValueError where a rank's checksum is not rank 0's; an empty one is not compared."""
    wrong = [rank for rank, one in enumerate(checksums) if one and one != checksums[0]]
    if wrong:
        raise ValueError(
            f"before step {step} the weights of rank {', '.join(map(str, wrong))} differ from those of rank 0: something but "
            "the run has written them, or the ranks' hardware or libraries round otherwise. Run the same command again on all "
            "ranks: rank 0 continues from its last checkpoint, and the others rebuild their weights from its run log"
        )
