"""An interpreter of PTX, in NumPy over a block's threads: what a compiler made of a kernel, without a GPU.

It knows the instructions that the kernels here compile to. Whatever else it meets is :class:`Refused`, with
the instruction's text. Arithmetic is exact to the last bit: fused and separate multiplications and additions
are kept apart, and subnormals are flushed only where an instruction says so. What a GPU would leave
undefined is an error: memory that no argument points to, addresses that are not aligned, shared memory that
two warps use without a barrier in between, shuffles with threads that took another branch.
"""

from tests.emulation.ptx.machine import launch
from tests.emulation.ptx.memory import Fault
from tests.emulation.ptx.parsing import Refused

__all__ = ["Fault", "Refused", "launch"]
