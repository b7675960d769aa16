"""Tuners: what sets sigma per block; their networks, features, normalizers, files and sources."""

from l2l.tuners.api import Tuner
from l2l.tuners.features import CONSTANT_COLUMNS, RunStatistics, feature_set
from l2l.tuners.fingerprint import Fingerprint
from l2l.tuners.model import Provenance, random_basis, ranks
from l2l.tuners.normalize import NORMALIZERS, EnergyNormalizer
from l2l.tuners.plan import Depth, TrainingPlan
from l2l.tuners.transfer import Level, check_level, compare

__all__ = [
    "CONSTANT_COLUMNS",
    "NORMALIZERS",
    "Depth",
    "EnergyNormalizer",
    "Fingerprint",
    "Level",
    "Provenance",
    "RunStatistics",
    "TrainingPlan",
    "Tuner",
    "check_level",
    "compare",
    "feature_set",
    "random_basis",
    "ranks",
]
