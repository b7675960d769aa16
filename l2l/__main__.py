"""``python -m l2l`` is ``l2l``."""

import sys

from l2l.cli import main

sys.exit(main())
