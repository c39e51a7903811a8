"""Where samples come from: arrays, folders of images, generators, or random numbers."""

from pwopt.data.generated import CalibrationDataReader
from pwopt.data.preprocess import Preprocess
from pwopt.data.random import random_data
from pwopt.data.samples import Batch, Samples, fixed_batch
from pwopt.data.sources import Source, open_data

__all__ = [
    "Batch",
    "CalibrationDataReader",
    "Preprocess",
    "Samples",
    "Source",
    "fixed_batch",
    "open_data",
    "random_data",
]
