"""The base of specifications."""

from pydantic import BaseModel, ConfigDict

from coreai_opt.common import CompressionType

__all__ = ["CompressionSpec"]


class CompressionSpec(BaseModel):
    """How to compress one tensor. Immutable; unknown fields are refused.

    A subclass says of which kind it is with a private attribute ``_compression_type``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def get_compression_type(self) -> CompressionType:
        """The kind of compression.

        Raises:
            AttributeError: the class does not define ``_compression_type``.
        """
        return self._compression_type  # type: ignore[attr-defined, no-any-return]
