"""What builders know of a run beside their own configuration."""

from typing import Any

from coreai_opt.controllers.core.config import InitArgs, InputInfo

__all__ = ["BuildContext"]


class BuildContext:
    """What builders know of a run beside their own configuration.

    Args:
        init_args: loaders and functions for initialisation.
        input_info: the model's inputs.
        initialize: False where a state is loaded instead.
        dummy_forward: calls the model; None to make its inputs from ``input_info`` or the loader.
    """

    def __init__(
        self,
        init_args: InitArgs | None = None,
        input_info: list[InputInfo] | None = None,
        initialize: bool = True,
        dummy_forward: Any = None,
    ) -> None:
        self.init_args = init_args or InitArgs()
        self.input_info = input_info or []
        self.initialize = initialize
        self.dummy_forward = dummy_forward
        self.uncompressed_accuracy: float | None = None
