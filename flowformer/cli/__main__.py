"""``python -m flowformer.cli``."""

import sys

from flowformer.cli import main

sys.exit(main())
