"""``python -m confsteer``."""

from confsteer.cli import main

main()
