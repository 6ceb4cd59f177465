"""`python -m gripvlm`: the command line."""

from gripvlm.cli import main

main()
