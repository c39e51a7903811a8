"""The passes, one a file; `_*.py` are parts of some. `pwopt.registry` lists them."""
