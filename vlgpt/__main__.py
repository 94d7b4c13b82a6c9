"""`python -m vlgpt` is `vlgpt`."""

import sys

from vlgpt.cli import main

sys.exit(main())
