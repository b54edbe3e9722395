"""``python -m coreai_opt``: see ``--help``."""

import sys

from coreai_opt._cli import main

if __name__ == "__main__":
    sys.exit(main())
