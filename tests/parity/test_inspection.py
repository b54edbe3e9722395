"""Records and text of an inspection are those of Apple's package."""

from typing import Any

import pytest

from . import inspected_models
from .conftest import Oracle


@pytest.fixture(scope="module", params=["eager", "graph"])
def both(request: pytest.FixtureRequest, asked_oracle: Oracle) -> tuple[dict[str, Any], dict[str, Any]]:
    job = {"module": "inspected_models", "mode": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        ours = inspected_models.answer(job)
    return ours, asked_oracle.ask(f"inspection-{request.param}", job)


@pytest.mark.parametrize("model", inspected_models.MODELS)
def test_records_and_text_are_equal(model: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = both
    names = [name for name in theirs if name.startswith(f"{model}-")]
    assert names
    for name in names:
        assert ours[name]["modules"] == theirs[name]["modules"], name
        # The order of the modules is that of the tree.
        assert list(ours[name]["modules"]) == list(theirs[name]["modules"]), name
        assert ours[name]["text"] == theirs[name]["text"], name
