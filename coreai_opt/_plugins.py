"""Loads what other packages add to this one: the entry points of a group."""

import importlib.metadata
import warnings

__all__ = ["PLUGIN_GROUP", "load_plugins"]

PLUGIN_GROUP = "coreai_opt.plugins"

# What the engine's distribution has for Apple's package: this one is on the engine already.
_UNDER_APPLES_PACKAGE = "coreai_accelerate"


def load_plugins() -> None:
    """Call each entry point of the group, without arguments.

    A plugin registers what it adds, such as simulators or granularities. One that fails is passed over with a
    RuntimeWarning that names it.
    """
    for entry_point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        if entry_point.module == _UNDER_APPLES_PACKAGE:
            continue
        try:
            entry_point.load()()
        except Exception as error:  # noqa: BLE001 - a plugin may fail in any way, and must not stop the import
            warnings.warn(
                f"the plugin {entry_point.name!r} ({entry_point.value}) was not loaded: {error!r}. "
                f"What it adds is missing",
                RuntimeWarning,
                stacklevel=3,
            )
