import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Without the warnings of the converters, which they give at each conversion."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only been validated with torch.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
