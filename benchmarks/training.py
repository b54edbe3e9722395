"""``python -m benchmarks.training``: see :mod:`benchmarks.models.training`."""

import sys

from benchmarks.models.training import main

if __name__ == "__main__":
    sys.exit(main())
