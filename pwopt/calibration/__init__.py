"""What a network does on samples: their choice, statistics of its layers, a walk through it."""

from pwopt.calibration.samples import LIMIT, Calibration, calibration_samples, held_out
from pwopt.calibration.statistics import Statistics, gather
from pwopt.calibration.walk import Stop, Walk

__all__ = [
    "LIMIT",
    "Calibration",
    "Statistics",
    "Stop",
    "Walk",
    "calibration_samples",
    "gather",
    "held_out",
]
