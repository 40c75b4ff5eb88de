"""``python -m sparing.cli``."""

import sys

from sparing.cli import main

sys.exit(main())
