"""``python -m flowformer``."""

import sys

from flowformer.cli import main

sys.exit(main())
