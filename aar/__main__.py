"""`python -m aar`: the `aar` command."""

import sys

from .cli import main

sys.exit(main())
