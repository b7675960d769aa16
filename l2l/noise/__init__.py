"""Noise as a pure function of its key: seed, step, draw, block name and global element index.

Nothing depends on visiting order, device, thread count, sharding or on what was drawn before. The stream is
defined by :mod:`l2l.noise.reference`; any other backend must give the same bits.
"""

from l2l.noise.dispatch import (
    active_backend,
    add_noise,
    add_noise_to,
    backend_problem,
    chunk_sums,
    noise_dot,
    prepare_memory,
)
from l2l.noise.key import Distribution, Key, round_scale, standard_deviation
from l2l.noise.reference import CHUNK, hash_bits, integers, standard_noise, total
from l2l.noise.slices import MomentRequest, NoiseTerm, Sums, TensorSlice, computed_in, shard_pieces

__all__ = [
    "CHUNK",
    "Distribution",
    "Key",
    "MomentRequest",
    "NoiseTerm",
    "Sums",
    "TensorSlice",
    "active_backend",
    "add_noise",
    "add_noise_to",
    "backend_problem",
    "chunk_sums",
    "computed_in",
    "hash_bits",
    "integers",
    "noise_dot",
    "prepare_memory",
    "round_scale",
    "shard_pieces",
    "standard_deviation",
    "standard_noise",
    "total",
]
