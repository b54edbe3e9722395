"""What a model of transformers refuses as long as its embeddings are compressed."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["guard_embeddings"]

_RESIZE = "resize_token_embeddings"


class _Refusal:
    """Takes the place of a model's method."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{_RESIZE}: the embedding's weight, or that of the output layer, is compressed, and a new one "
            f"would take its place without its simulator. Resize the embeddings before prepare; or "
            f"finalize(backend='torch') first, resize them, and prepare the model again"
        )


def guard_embeddings(model: nn.Module) -> None:
    """Let a model that can resize its embeddings refuse it while one of them is compressed."""
    model.__dict__.pop(_RESIZE, None)
    if not callable(getattr(model, _RESIZE, None)):
        return
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, name, lambda: None)()
        except NotImplementedError:  # of models that read no tokens
            continue
        if isinstance(layer, nn.Module) and parametrize.is_parametrized(layer, "weight"):
            model.__dict__[_RESIZE] = _Refusal()
