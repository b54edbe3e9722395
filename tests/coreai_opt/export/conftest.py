import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Without the warnings of the converters, which they give at each conversion."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only been validated with torch.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        for message in (
            "`torch.jit.trace.* is deprecated",
            ".*has been renamed to",
            ".*deprecated and will be",
        ):
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", message="overflow encountered in cast")
        yield
