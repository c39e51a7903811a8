"""ModelProto → gs.Graph → ModelProto, keeping what GraphSurgeon's own import and export lose.

GraphSurgeon is the structure that passes edit. Its importer drops doc strings, metadata, sparse
and optional types, unused initialisers and more; its exporter recodes low-precision tensors. So
both directions are written here, by one rule: whatever nobody edited is given back as the very
message it came from, and only what was edited is written anew.
"""

from pwopt.roundtrip.reading import Origins, read
from pwopt.roundtrip.tensors import SMALL, dtype, with_data
from pwopt.roundtrip.variables import axes
from pwopt.roundtrip.writing import copy_fields, write

__all__ = ["SMALL", "Origins", "axes", "copy_fields", "dtype", "read", "with_data", "write"]
