"""From a specification to a simulator."""

from abc import ABC, abstractmethod
from enum import Enum

from coreai_opt._utils.spec_utils import PartialConstructor
from coreai_opt.config.spec.base import CompressionSpec
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase

__all__ = ["CompressionComponentFactoryBase", "CompressionTargetTensor"]


class CompressionTargetTensor(Enum):
    """What role the compressed tensor plays."""

    WEIGHT = "weight"
    ACTIVATION = "activation"
    LUT = "lut"


class CompressionComponentFactoryBase(ABC):
    """Builds the simulator that a specification describes."""

    @classmethod
    @abstractmethod
    def construct(
        cls, spec: CompressionSpec | None, target: CompressionTargetTensor
    ) -> CompressionSimulatorBase | None:
        """The simulator for a tensor of role ``target``; None for no compression."""

    @classmethod
    @abstractmethod
    def construct_partial(
        cls, spec: CompressionSpec | None, target: CompressionTargetTensor
    ) -> PartialConstructor[CompressionSimulatorBase] | None:
        """A constructor of such simulators, each independent of the others; None for no compression."""
