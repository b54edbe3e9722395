"""The plugin's source, in case that it is not installed: the drop-in brings the engine alone."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "kernels"))
