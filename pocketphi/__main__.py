"""`python -m pocketphi` is the `phi` command."""

from pocketphi.cli import main

main()
