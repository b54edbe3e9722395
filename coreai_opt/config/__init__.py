"""Configuration of compression."""

from coreai_opt.config.spec import CompressionSpec, CompressionType

__all__ = ["CompressionSpec", "CompressionType"]
