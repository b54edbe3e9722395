"""What a tensor's compression is made of: its specification, its simulator, and the factory between them."""

from coreai_opt.common import CompressionType
from coreai_opt.config.spec.base import CompressionSpec
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase
from coreai_opt.config.spec.factory import CompressionComponentFactoryBase, CompressionTargetTensor

__all__ = [
    "CompressionComponentFactoryBase",
    "CompressionSimulatorBase",
    "CompressionSpec",
    "CompressionTargetTensor",
    "CompressionType",
]
