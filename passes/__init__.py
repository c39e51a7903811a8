"""The passes, one a file. `pwopt.registry` lists them."""
