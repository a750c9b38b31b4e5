"""`python -m flashcl`: the commands, where no script is on the path."""

from flashcl.cli import main

raise SystemExit(main())
