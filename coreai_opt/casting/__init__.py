"""Casts exported programs to 16 bits: float32 to float16, int32 to int16."""

from coreai_opt.casting.casting import cast_fp32_to_fp16, cast_int32_to_int16, cast_to_16_bit_precision

__all__ = ["cast_fp32_to_fp16", "cast_int32_to_int16", "cast_to_16_bit_precision"]
