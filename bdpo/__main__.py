"""``python -m bdpo`` is the command ``bdpo``."""

import sys

from bdpo.cli import main

sys.exit(main())
