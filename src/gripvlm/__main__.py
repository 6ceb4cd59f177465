"""`python -m gripvlm`: the command line."""

from gripvlm.cli import main

raise SystemExit(main())
