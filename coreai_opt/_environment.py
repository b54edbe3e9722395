"""What surrounds the package: another owner of its import name, and a dependency that talks."""

import importlib.metadata
import importlib.util
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = [
    "ENGINES_DISTRIBUTION",
    "check_engine",
    "check_state_version",
    "engine_mismatch",
    "own_version",
    "quiet_torchao_import",
    "state_versions",
    "warn_of_name_clash",
]

_OTHER_DISTRIBUTION = "coreai-opt"
_OWN_DISTRIBUTION = "coreai-opt-fused"
ENGINES_DISTRIBUTION = "coreai-kernels"
_ENGINES_PACKAGE = "coreai_kernels"


def own_version() -> str:
    """The release of this package; "0+unknown" where it is not installed, as in a source tree on the path."""
    try:
        return importlib.metadata.version(_OWN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


# The form of what compressors and checkpoints save. A later form that this one cannot read counts one more.
_STATE = 1


def state_versions() -> dict[str, Any]:
    """What a saved state was made with: its form, this package, torch."""
    return {"state": _STATE, "coreai_opt_fused": own_version(), "torch": importlib.metadata.version("torch")}


def check_state_version(versions: Any, what: str) -> None:
    """ValueError unless this package reads the form of state that ``versions`` tell; none are the first's.

    Args:
        versions: of :func:`state_versions`.
        what: where they were found, for the error.
    """
    state = versions.get("state", _STATE) if isinstance(versions, Mapping) else versions
    if not isinstance(state, int) or not 1 <= state <= _STATE:
        made_by = versions.get("coreai_opt_fused") if isinstance(versions, Mapping) else None
        raise ValueError(
            f"{what} has the form {state!r}, made by version {made_by} of coreai-opt-fused. This is version "
            f"{own_version()}, which reads form {_STATE}: install a later one"
        )


def check_engine() -> None:
    """ImportError without the engine; a RuntimeWarning about one of another version than this package's."""
    if importlib.util.find_spec(_ENGINES_PACKAGE) is None:
        raise ImportError(
            f"{_OWN_DISTRIBUTION} runs on the distribution {ENGINES_DISTRIBUTION}, which is not installed. "
            f"To fix: pip install {ENGINES_DISTRIBUTION}; in a checkout: "
            f"pip install ./kernels --no-build-isolation"
        )
    if text := engine_mismatch():
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def engine_mismatch() -> str | None:
    """What is wrong if the installed engine is of another version than this package; else None."""
    try:
        own, engines = (
            importlib.metadata.version(name) for name in (_OWN_DISTRIBUTION, ENGINES_DISTRIBUTION)
        )
    except importlib.metadata.PackageNotFoundError:
        return None  # one of them is a source tree on the path
    if own == engines:
        return None
    return (
        f"{_OWN_DISTRIBUTION} {own} needs {ENGINES_DISTRIBUTION} {own}, and {engines} is installed. "
        f"To fix: pip install {ENGINES_DISTRIBUTION}=={own}"
    )


def warn_of_name_clash() -> None:
    """Warn, once an import, if Apple's ``coreai-opt`` is installed too: both own the name ``coreai_opt``."""
    try:
        other = importlib.metadata.distribution(_OTHER_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return
    here = pathlib.Path(__file__).resolve().parent
    there = pathlib.Path(str(other.locate_file("coreai_opt"))).resolve()
    if here == there:
        state = f"Both have written into {here}, so that modules of the two are mixed there."
        remedy = (
            f"Remove both, then install the one you want: `pip uninstall {_OTHER_DISTRIBUTION} "
            f"{_OWN_DISTRIBUTION}`, then `pip install {_OWN_DISTRIBUTION}`."
        )
    else:
        state = f"Python found this one first, in {here}; the other one, in {there}, is hidden."
        remedy = f"Keep one in an environment: `pip uninstall {_OTHER_DISTRIBUTION}` to stay with this one."
    warnings.warn(
        f"{_OTHER_DISTRIBUTION} {other.version} and {_OWN_DISTRIBUTION} both provide the import package "
        f"coreai_opt. {state} {remedy}",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_not_noise(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return not ("Failed to load" in text or "register_constant" in text or "Skipping import of cpp" in text)


@contextmanager
def quiet_torchao_import() -> Iterator[None]:
    """While it is active, drop the log lines with which torchao reports its own optional parts.

    torchao logs each of its binary extensions that does not fit the machine, none of which is used here, and
    a deprecation inside its own code. Other records pass, and the logging configuration is left as it was.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(_is_not_noise)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_noise)
