"""THE table of number formats and of scale formats. Whatever depends on a format takes its facts from here.

The reference and Triton import this module; the native code includes a header that :func:`native_header`
writes when the package is built. The build reads this file without torch, and without the package: it imports
nothing but the standard library, and names dtypes as torch spells them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "NUMBER_FORMATS",
    "SCALE_FORMATS",
    "Format",
    "FloatFormat",
    "NumberFormat",
    "ScaleFormat",
    "ScaleFacts",
    "largest_exponent",
    "native_header",
]


class Format(IntEnum):
    """The set of values that a quantized element can take. The numbers are part of the operators' schemas.

    ``INT`` is the integers of ``[quant_min, quant_max]``. The floating-point formats are those of the OCP
    8-bit floating point (E4M3 without infinities, E5M2) and microscaling (E2M1) specifications.
    """

    INT = 0
    E4M3 = 1
    E5M2 = 2
    E2M1 = 3

    @property
    def facts(self) -> "FloatFormat":
        """How the values of a floating-point format are made up. Not defined for ``INT``."""
        return _FLOAT_FORMATS[self]


class ScaleFormat(IntEnum):
    """The set of values that a scale can take. The numbers are part of the operators' schemas.

    With ``amax`` the largest magnitude of a block, and ``emax`` the exponent of the number format's largest
    value (of integers that of ``quant_max``):

    =======  ===================================================================================
    FLOAT32  any float32
    E8M0     ``2 ** (floor(log2(amax)) - emax)`` (OCP microscaling specification 1.0, section 6.3)
    E4M3     ``e4m3((amax / quant_max) / t) * t``, with one float32 number ``t`` for the tensor, the
             largest ``amax`` divided by ``448 * quant_max`` (NVIDIA's NVFP4)
    =======  ===================================================================================
    """

    FLOAT32 = 0
    E8M0 = 1
    E4M3 = 2

    @property
    def facts(self) -> "ScaleFacts":
        """What is known about the scales of the format."""
        return SCALE_FORMATS[self]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A floating-point format.

    Attributes:
        bits: of one value, the sign's among them.
        mantissa_bits: stored mantissa bits.
        min_exponent: exponent of the smallest normal number.
        max_exponent: exponent of the largest finite number (``emax``).
        largest: that number.
        has_infinity: whether the largest exponent means infinity and NaN; else one mantissa of it may be NaN.
    """

    bits: int
    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    largest: float
    has_infinity: bool


_FLOAT_FORMATS: Mapping[Format, FloatFormat] = {
    Format.E4M3: FloatFormat(8, 3, -6, 8, 448.0, False),
    Format.E5M2: FloatFormat(8, 2, -14, 15, 57344.0, True),
    Format.E2M1: FloatFormat(4, 1, 0, 2, 6.0, False),
}


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """What a quantized tensor's dtype stands for.

    Attributes:
        dtype: torch's name.
        format: the set that the values are from.
        bits: of one value.
        quant_min: smallest value.
        quant_max: largest value.
        storage: dtype that holds one value.
        packed: dtype of packed storage where torch has one, else None. ``pack_bits`` packs any width.
        is_extension: whether Apple's package lacks it.
    """

    dtype: str
    format: Format
    bits: int
    quant_min: float
    quant_max: float
    storage: str
    packed: str | None = None
    is_extension: bool = False


def _signed(bits: int, is_extension: bool = False) -> NumberFormat:
    half = 2 ** (bits - 1)
    return NumberFormat(f"int{bits}", Format.INT, bits, -half, half - 1, "int8", is_extension=is_extension)


def _unsigned(bits: int) -> NumberFormat:
    return NumberFormat(f"uint{bits}", Format.INT, bits, 0, 2**bits - 1, "uint8")


def _floating(dtype: str, format: Format, storage: str, packed: str | None = None) -> NumberFormat:
    facts = format.facts
    return NumberFormat(dtype, format, facts.bits, -facts.largest, facts.largest, storage, packed)


# By torch's name of the dtype.
NUMBER_FORMATS: Mapping[str, NumberFormat] = {
    row.dtype: row
    for row in (
        _signed(2),
        _signed(3, is_extension=True),
        _signed(4),
        _signed(5, is_extension=True),
        _signed(6),
        _signed(7, is_extension=True),
        _signed(8),
        _unsigned(2),
        _unsigned(4),
        _unsigned(6),
        _unsigned(8),
        _floating("float8_e4m3fn", Format.E4M3, "float8_e4m3fn"),
        _floating("float8_e5m2", Format.E5M2, "float8_e5m2"),
        _floating("float4_e2m1fn_x2", Format.E2M1, "float8_e4m3fn", packed="float4_e2m1fn_x2"),
    )
}


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """A scale format.

    Attributes:
        dtype: torch's name; None for float32, which specifications do not name.
        smallest: smallest scale of a block. Of ``E4M3`` in units of the tensor's scale, for which
            ``smallest_of_tensor`` holds.
        smallest_of_tensor: smallest scale of a tensor, 0 where there is none.
        number_formats: dtypes whose values may have such scales, in the order of messages.
        of_integers: whether the engine has such scales for integers, of a range around zero.
    """

    dtype: str | None
    smallest: float
    number_formats: tuple[str, ...]
    of_integers: bool = True
    smallest_of_tensor: float = 0.0


_FLOATS = ("float4_e2m1fn_x2", "float8_e4m3fn", "float8_e5m2")

SCALE_FORMATS: Mapping[ScaleFormat, ScaleFacts] = {
    # float4 has no float32 scales in specifications; the engine does not mind.
    ScaleFormat.FLOAT32: ScaleFacts(None, 2.0**-23, tuple(NUMBER_FORMATS)),
    ScaleFormat.E8M0: ScaleFacts("float8_e8m0fnu", 2.0**-126, ("int8", *_FLOATS)),
    # The smallest positive e4m3; and products of the two are no subnormal float32.
    ScaleFormat.E4M3: ScaleFacts("float8_e4m3fn", 2.0**-9, ("float4_e2m1fn_x2",), False, 2.0**-117),
}


def largest_exponent(format: int, quant_max: float) -> int:
    """Exponent of the largest quantized value, which a power-of-two scale brings the largest element to.

    That of the format if it is floating point, else of ``quant_max``: 6 for int8, up to 127.
    """
    fmt = Format(format)
    return fmt.facts.max_exponent if fmt != Format.INT else int(quant_max).bit_length() - 1


def native_header() -> str:
    """``common/formats.h`` of the native code: the codes, and the facts as constants."""
    lines = [
        "// Made from kernels/coreai_kernels/formats.py by setup.py.",
        "#pragma once",
        "",
        "namespace coreai {",
        "",
        _enumeration("Format", Format),
        _enumeration("ScaleFormat", ScaleFormat),
        "",
        "// X(format) for each floating-point format.",
        f"#define COREAI_FOR_EACH_FLOAT_FORMAT(X) {' '.join(f'X({_constant(f)})' for f in _FLOAT_FORMATS)}",
        "",
        "template <Format kFormat>",
        "struct FormatFacts;",
    ]
    for fmt, facts in _FLOAT_FORMATS.items():
        lines += [
            "template <>",
            f"struct FormatFacts<Format::{_constant(fmt)}> {{",
            f"  static constexpr int kBits = {facts.bits}, kMantissaBits = {facts.mantissa_bits};",
            f"  static constexpr int kMinExponent = {facts.min_exponent};",
            f"  static constexpr int kMaxExponent = {facts.max_exponent};",
            f"  static constexpr float kMax = {facts.largest!r}f;",
            f"  static constexpr bool kHasInfinity = {str(facts.has_infinity).lower()};",
            "};",
        ]
    lines += ["", "template <ScaleFormat kFormat>", "struct ScaleFacts;"]
    for scale, its in SCALE_FORMATS.items():
        lines += [
            "template <>",
            f"struct ScaleFacts<ScaleFormat::{_constant(scale)}> {{",
            f"  static constexpr float kSmallest = {its.smallest.hex()}f;",
            f"  static constexpr float kSmallestOfTensor = {its.smallest_of_tensor.hex()}f;",
            "};",
        ]
    return "\n".join([*lines, "", "}  // namespace coreai", ""])


def _constant(member: IntEnum) -> str:
    return "kInt" if member.name == "INT" else "kFloat32" if member.name == "FLOAT32" else f"k{member.name}"


def _enumeration(name: str, members: type[IntEnum]) -> str:
    values = ", ".join(f"{_constant(member)} = {member.value}" for member in members)
    return f"enum class {name} : int {{ {values} }};"
