"""``python -m pwopt``."""

from pwopt.cli import main

main()
