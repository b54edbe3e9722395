"""The fast path of repeated calls."""

from coreai_kernels.runtime.captured import (
    Guarded,
    capture,
    fast_path_counts,
    is_enabled,
    reset_fast_path_counts,
)
from coreai_kernels.runtime.generation import Generation

__all__ = ["Generation", "Guarded", "capture", "fast_path_counts", "is_enabled", "reset_fast_path_counts"]
