"""`python -m dsjax`."""

import sys

from dsjax.cli.main import main

sys.exit(main())
