// Type dispatch, threads and bit streams for the kernels of one instruction set.
#pragma once

#include "cpu/kernels.h"

namespace coreai::cpu::COREAI_ISA {
namespace {

using F = Simd::F;
using I = Simd::I;
using M = Simd::M;
constexpr int kWidth = Simd::kWidth;

// Work is shared out in multiples of this many elements, so that threads never write the same byte of a mask.
constexpr int64_t kAlignment = 512;

template <class T>
COREAI_HD T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
COREAI_HD T max(T a, T b) {
  return a > b ? a : b;
}

COREAI_HD int64_t row_length(const Geometry& g) { return g.run * g.columns; }

// First block of a row.
COREAI_HD int64_t row_base(const Geometry& g, int64_t row) {
  int64_t base = 0;
  for (int axis = g.outer_axes - 1; axis >= 0; --axis) {
    base += row % g.outer[axis].size * g.outer[axis].stride;
    row /= g.outer[axis].size;
  }
  return base;
}

// body(begin, end) over [0, count) in pieces that start at multiples of `unit` and hold about `grain` or more. Here and on
// other threads the same copy of the body runs.
template <class Body>
void parallel_for(int64_t count, int64_t unit, int64_t grain, Body body) {
  const int64_t units = (count + unit - 1) / unit;
  struct Context {
    Body* body;
    int64_t unit, count;
  } context{&body, unit, count};
  void (*const piece)(int64_t, int64_t, void*) = [](int64_t begin, int64_t end, void* raw) {
    auto* c = static_cast<Context*>(raw);
    (*c->body)(begin * c->unit, min(end * c->unit, c->count));
  };
  if (count <= grain || threads() == 1) {
    piece(0, units, &context);
  } else {
    parallel(0, units, max<int64_t>(1, grain / unit), piece, &context);
  }
}

// Fetches two vectors that will be read and two that will be written. Beyond the end, nothing happens.
template <class T>
COREAI_HD void fetch(const T* read, const T* written) {
  for (int64_t i = 0; i < 2 * kWidth; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(read + i, 0, 2);
    __builtin_prefetch(written + i, 1, 3);
  }
}

// Fetches what a loop over neighbouring elements will read and write, while it works on two vectors: loops that are
// busy, or that read only what they have read before, leave the memory idle otherwise. Elements are read so far ahead
// that also those observed before they are quantized have come.
template <class T>
COREAI_HD void fetch_ahead(const T* read, const T* written) {
  fetch(read + 16384, written + 512);
}

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

template <class T>
struct Type {
  using type = T;
};

// float64 never gets here: operators convert it, for arithmetic is in float32 anyway.
template <class Body>
void with_type(Element element, Body body) {
  switch (element) {
    case Element::kBFloat16:
      return body(Type<BFloat16>{});
    case Element::kFloat16:
      return body(Type<Float16>{});
    default:
      return body(Type<float>{});
  }
}

// The kind of all floating-point formats: one copy of the code, which takes what differs from here. A copy for each would
// take longer to compile, and be no quicker: the numbers are in registers either way.
template <Division kDivision_ = Division::kDivide>
struct FloatKind {
  static constexpr bool kIsInt = false, kHasOffset = false;
  static constexpr Division kDivision = kDivision_;
  static constexpr bool kIsPackedBf16 = kDivision >= Division::kPackedBf16;

  FloatRounding rounding = {};
  float largest = 0;

  template <Format kFormat>
  static FloatKind of() {
    return {FloatRounding::of<kFormat>(), FormatFacts<kFormat>::kMax};
  }
  template <class S>
  COREAI_HD typename S::F round(typename S::F q) const {
    return round_to_format<S>(q, rounding);
  }
};

// The same kind with another way to compute quotients.
template <Division kDivision, Format kFormat, bool kHasOffset, Division kOther>
COREAI_HD Kind<kFormat, kHasOffset, kDivision> dividing_by(Kind<kFormat, kHasOffset, kOther>) {
  return {};
}
template <Division kDivision, Division kOther>
COREAI_HD FloatKind<kDivision> dividing_by(FloatKind<kOther> kind) {
  return {kind.rounding, kind.largest};
}

// Calls body(kind) with the kind of a format.
template <class Body>
void with_kind(Format format, bool has_offset, Body body) {
  FloatKind<> kind;
  switch (format) {
    case Format::kInt:
      return has_offset ? body(Kind<Format::kInt, true>{}) : body(Kind<Format::kInt>{});
#define COREAI_CASE(name)                   \
  case Format::name:                        \
    kind = FloatKind<>::of<Format::name>(); \
    break;
      COREAI_FOR_EACH_FLOAT_FORMAT(COREAI_CASE)
#undef COREAI_CASE
  }
  body(kind);
}

// Bits in sequence, the lowest of a byte first, from a byte boundary on.
class BitWriter {
 public:
  // Where whole bytes go. Loops keep it in a register: stores of bytes may alias any member.
  using Cursor = uint8_t*;
  explicit BitWriter(uint8_t* out) : out_(out) {}
  COREAI_HD bool aligned() const { return fill_ == 0; }
  COREAI_HD Cursor cursor() const { return out_; }
  COREAI_HD void resume(Cursor cursor) { out_ = cursor; }
  static COREAI_HD void put_lanes(Cursor& cursor, uint32_t bits) {
    __builtin_memcpy(cursor, &bits, kWidth / 8);
    cursor += kWidth / 8;
  }
  static COREAI_HD Cursor at(Cursor cursor, int64_t bytes) { return cursor + bytes; }
  static COREAI_HD void put_pair(Cursor& cursor, uint32_t bits) {
    __builtin_memcpy(cursor, &bits, kWidth / 4);
    cursor += kWidth / 4;
  }
  COREAI_HD void push(uint32_t bits, int count) {
    pending_ |= static_cast<uint64_t>(bits) << fill_;
    fill_ += count;
    for (; fill_ >= 8; fill_ -= 8, pending_ >>= 8) *out_++ = static_cast<uint8_t>(pending_);
  }
  COREAI_HD void flush() {
    if (fill_ > 0) *out_ = static_cast<uint8_t>(pending_);
  }

 private:
  uint8_t* out_;
  uint64_t pending_ = 0;
  int fill_ = 0;
};

template <class Bits, class S = Simd>
COREAI_HD void put_masks(typename Bits::Cursor& cursor, M a, M b) {
  if constexpr (requires { S::bits(a, b); }) {
    Bits::put_pair(cursor, S::bits(a, b));
  } else {
    Bits::put_lanes(cursor, S::bits(a));
    Bits::put_lanes(cursor, S::bits(b));
  }
}

struct NoBits {
  struct Cursor {};
  COREAI_HD bool aligned() const { return true; }
  COREAI_HD Cursor cursor() const { return {}; }
  COREAI_HD void resume(Cursor) {}
  static COREAI_HD void put_lanes(Cursor&, uint32_t) {}
  static COREAI_HD Cursor at(Cursor, int64_t) { return {}; }
  static COREAI_HD void put_pair(Cursor&, uint32_t) {}
  COREAI_HD void push(uint32_t, int) {}
  COREAI_HD void flush() {}
};

}  // namespace
}  // namespace coreai::cpu::COREAI_ISA
