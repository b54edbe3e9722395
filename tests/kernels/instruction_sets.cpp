// Runs the kernels of one instruction set on seeded cases, without torch, and prints a digest of each result.
//
// Two builds that print the same agree bit for bit (any NaN equals any other): `make neon-check` compares NEON, under
// an emulator, with what x86-64's generic code gives, which the tests compare with the reference.
//
//   instruction_sets SET [CASES]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/geometry.h"
#include "cpu/kernels.h"

namespace coreai::cpu {
#if defined(COREAI_TEST_THREADS)
// Threads for every piece of `grain` items, all at once: what they share, a sanitizer sees.
void parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  const int64_t pieces = std::min<int64_t>(COREAI_TEST_THREADS, (end - begin + grain - 1) / grain);
  const int64_t piece = ((end - begin + grain - 1) / grain + pieces - 1) / pieces * grain;
  for (int64_t at = begin; at < end; at += piece) pool.emplace_back(body, at, std::min(at + piece, end), context);
  for (std::thread& thread : pool) thread.join();
}
int64_t threads() { return COREAI_TEST_THREADS; }
#else
void parallel(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(begin, end, context);
}
int64_t threads() { return 1; }
#endif
}  // namespace coreai::cpu

using namespace coreai;
using namespace coreai::cpu;

namespace {

#if defined(COREAI_TEST_THREADS)
constexpr int64_t kEnlarged = 64;  // tensors that are worth several threads
#else
constexpr int64_t kEnlarged = 1;
#endif

uint64_t state = 1;

uint64_t next() {  // SplitMix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
}
bool chance(int64_t in) { return pick(1, in) == 1; }
float unit() { return static_cast<float>(next() >> 40) * 0x1p-24f; }

float any_float(bool special, float magnitude) {
  static const float odd[] = {0.0f,
                              -0.0f,
                              0.5f,
                              -0.5f,
                              1e-41f,
                              -3e-39f,
                              3e38f,
                              -3e38f,
                              65504.0f,
                              -1.5f,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN()};
  if (special && chance(6)) return odd[pick(0, 12)];
  const float x = (unit() + unit() + unit() - 1.5f) * magnitude;
  return chance(4) ? static_cast<float>(static_cast<int>(x * 8)) / 16 : x;  // ties
}

int64_t size_of(Element e) { return e == Element::kFloat32 ? 4 : e == Element::kFloat64 ? 8 : 2; }

using Bytes = std::vector<uint8_t>;

// Elements of that type: bits made here, without conversions that a compiler could do in its own way.
Bytes elements(Element e, int64_t n, bool special, float magnitude) {
  Bytes result(static_cast<size_t>(n * size_of(e)));
  for (int64_t i = 0; i < n; ++i) {
    const float x = any_float(special, magnitude);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint8_t* at = result.data() + i * size_of(e);
    if (e == Element::kFloat32) {
      std::memcpy(at, &bits, 4);
    } else if (e == Element::kBFloat16) {
      const uint16_t word = x != x ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
      std::memcpy(at, &word, 2);
    } else if (e == Element::kFloat16) {
      const uint16_t word = special ? static_cast<uint16_t>(next()) : static_cast<uint16_t>((next() & 0x83ff) | 0x3000);
      std::memcpy(at, &word, 2);
    } else {
      const double wide = x;
      std::memcpy(at, &wide, 8);
    }
  }
  return result;
}

uint64_t digest = 0;

void add(uint64_t word) { digest = (digest ^ word) * 0x100000001b3u + (digest >> 29); }

void add(Element e, const void* data, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* at = static_cast<const uint8_t*>(data) + i * size_of(e);
    if (e == Element::kFloat32) {
      uint32_t w;
      std::memcpy(&w, at, 4);
      add((w & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : w);
    } else if (e == Element::kFloat64) {
      uint64_t w;
      std::memcpy(&w, at, 8);
      add((w & 0x7fffffffffffffff) > 0x7ff0000000000000 ? 0x7ff8000000000000 : w);
    } else {
      const uint16_t infinity = e == Element::kBFloat16 ? 0x7f80 : 0x7c00;
      uint16_t w;
      std::memcpy(&w, at, 2);
      add((w & 0x7fff) > infinity ? 0x7fff : w);
    }
  }
}
void add(const Bytes& bytes) {
  for (const uint8_t byte : bytes) add(byte);
}
void add(const std::vector<float>& x) { add(Element::kFloat32, x.data(), static_cast<int64_t>(x.size())); }
void add(const std::vector<double>& x) { add(Element::kFloat64, x.data(), static_cast<int64_t>(x.size())); }
void add(const std::vector<int32_t>& x) {
  for (const int32_t word : x) add(static_cast<uint32_t>(word));
}

int64_t case_number = 0;
void tell(const char* what) {
  std::printf("%lld %s %016llx\n", static_cast<long long>(case_number), what, static_cast<unsigned long long>(digest));
  digest = 0;
}

Layout any_layout() {
  const int axes = static_cast<int>(pick(1, 4));
  Ints shape(static_cast<size_t>(axes)), order(static_cast<size_t>(axes));
  std::vector<int64_t> block;
  for (int i = 0; i < axes; ++i) {
    static const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 128};
    shape[static_cast<size_t>(i)] = sizes[pick(0, axes == 1 ? 16 : axes == 2 ? 14 : 8)];
    order[static_cast<size_t>(i)] = i;
  }
  if (axes == 1) shape[0] *= pick(1, 9);
  if (axes == 2) shape[pick(0, 1)] *= pick(1, 4);
  shape[0] *= kEnlarged;
  for (size_t i = static_cast<size_t>(axes); i-- > 1;)
    std::swap(order[i], order[static_cast<size_t>(chance(3) ? pick(0, static_cast<int64_t>(i)) : static_cast<int64_t>(i))]);
  for (int i = 0; i < axes; ++i) {
    const int64_t n = shape[static_cast<size_t>(i)];
    int64_t b = chance(3) ? 1 : chance(2) ? n : pick(1, n);
    while (n % b != 0) --b;
    block.push_back(b);
  }
  return make_layout(shape, order, block);
}

Element any_element() { return static_cast<Element>(pick(0, 2)); }

struct Numbers {
  Format format;
  float low, high;
};
Numbers any_numbers() {
  static const Numbers all[] = {{Format::kInt, -128, 127}, {Format::kInt, 0, 255},     {Format::kInt, -8, 7},
                                {Format::kInt, -7, 7},     {Format::kInt, 0, 15},      {Format::kInt, -2, 1},
                                {Format::kInt, 1, 200},    {Format::kE4M3, -448, 448}, {Format::kE5M2, -57344, 57344},
                                {Format::kE2M1, -6, 6}};
  return all[pick(0, 9)];
}

struct Parameters {
  std::vector<float> scale, offset;
  std::vector<int32_t> zero_point;
  Affine affine;

  Parameters(const Numbers& n, int64_t blocks, bool special, bool finite) {
    const int64_t kind = n.format == Format::kInt ? pick(0, 2) : 2;
    const bool words = chance(2), powers = chance(4);
    for (int64_t i = 0; i < blocks; ++i) {
      float s = (unit() + 0.01f) / (n.high - n.low) * 4;
      uint32_t bits;
      std::memcpy(&bits, &s, 4);
      if (words) bits &= 0xffff0000u;
      if (powers) bits &= 0x7f800000u;
      std::memcpy(&s, &bits, 4);
      if (special && chance(9))
        s = chance(2) ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
      scale.push_back(s);
      zero_point.push_back(kind == 0 ? static_cast<int32_t>(pick(static_cast<int64_t>(n.low), static_cast<int64_t>(n.high)))
                                     : 0);
      offset.push_back(chance(8) ? -0.0f : -unit());
    }
    affine = {
        n.format, n.low, n.high, scale.data(), kind == 0 ? zero_point.data() : nullptr, kind == 1 ? offset.data() : nullptr,
        0.0f,     finite};
    if (kind == 1) affine.constant = n.low;
  }
};

void quantization(const Kernels& k) {
  const Layout layout = any_layout();
  const Geometry& g = layout.geometry;
  const Element e = any_element();
  const Numbers numbers = any_numbers();
  const bool special = chance(2);
  const float magnitude = chance(3) ? 100.0f : 1.5f;
  const Bytes x = elements(e, g.numel, special, magnitude);
  Bytes y(x.size()), mask(static_cast<size_t>((g.numel + 7) / 8));
  Parameters p(numbers, g.blocks, special, !special && e != Element::kFloat16);
  k.fake_quantize({&g, e, x.data(), y.data(), mask.data(), p.affine});
  add(e, y.data(), g.numel), add(mask);
  tell("fake_quantize");
  k.fake_quantize({&g, e, x.data(), y.data(), nullptr, p.affine});
  add(e, y.data(), g.numel);
  tell("fake_quantize_without_mask");
  k.masked_gradient(e, x.data(), y.data(), mask.data(), g.numel);
  add(e, y.data(), g.numel);
  tell("masked_gradient");

  std::vector<float> low(static_cast<size_t>(g.blocks), std::numeric_limits<float>::infinity());
  std::vector<float> high(low.size(), -std::numeric_limits<float>::infinity());
  k.observe_range({&g, e, x.data(), low.data(), high.data()});
  for (float& v : low) v += 0.0f;  // which of equal zeros is found is up to the order
  for (float& v : high) v += 0.0f;
  add(low), add(high);
  tell("observe_range");
  static const ScaleFormat formats[] = {ScaleFormat::kFloat32, ScaleFormat::kE8M0, ScaleFormat::kE4M3};
  const Scheme scheme = numbers.format == Format::kInt ? static_cast<Scheme>(pick(0, 2)) : Scheme::kSymmetric;
  const ScaleFormat scales = scheme == Scheme::kAsymmetric ? ScaleFormat::kFloat32 : formats[pick(0, 2)];
  const Element rounding = chance(2) ? Element::kFloat32 : e;
  const auto rule = QParamsRule::of(scheme, numbers.format, numbers.low, numbers.high, scales, rounding);
  std::vector<float> scale(low.size()), minval(low.size());
  std::vector<int32_t> zero_point(low.size());
  k.choose_qparams(rule, low.data(), high.data(), g.blocks, {scale.data(), zero_point.data(), minval.data()});
  add(scale), add(zero_point), add(minval);
  tell("choose_qparams");

  UpdateRule update = {static_cast<RangeUpdate>(pick(0, 2)), chance(2), 0.01f, 0.99f, false, false, 0, 0};
  std::vector<float> running_low(low.size(), -0.25f), running_high(low.size(), 0.25f);
  Affine affine = p.affine;
  affine.scale = scale.data(), affine.zero_point = numbers.format == Format::kInt ? zero_point.data() : nullptr;
  affine.offset = nullptr, affine.finite = false;
  k.observe_and_fake_quantize({{&g, e, x.data(), y.data(), chance(2) ? mask.data() : nullptr, affine},
                               rule,
                               update,
                               {scale.data(), zero_point.data(), minval.data()},
                               running_low.data(),
                               running_high.data(),
                               Element::kFloat32});
  add(e, y.data(), g.numel), add(mask), add(scale), add(zero_point), add(running_low), add(running_high);
  tell("observe_and_fake_quantize");

  const Storage storage = numbers.format == Format::kE4M3   ? Storage::kE4M3
                          : numbers.format == Format::kE5M2 ? Storage::kE5M2
                          : numbers.format == Format::kE2M1 ? Storage::kFloat32
                          : numbers.low < 0                 ? Storage::kInt8
                                                            : Storage::kUInt8;
  Bytes codes(static_cast<size_t>(g.numel * (storage == Storage::kFloat32 ? 4 : 1)));
  const Bytes tame = elements(e, g.numel, false, magnitude);
  Parameters q(numbers, g.blocks, false, false);
  k.quantize({&g, tame.data(), codes.data(), q.affine, e, storage});
  add(codes);
  tell("quantize");
  k.dequantize({&g, codes.data(), y.data(), q.affine, e, storage});
  add(e, y.data(), g.numel);
  tell("dequantize");

  if (e != Element::kFloat64) {
    std::vector<float> start(low.size()), width(low.size());
    for (float& v : start) v = -unit();
    for (float& v : width) v = unit() + 0.05f;
    const int64_t sums = g.blocks == 1 ? (g.numel + 4095) / 4096 : g.blocks;
    std::vector<double> grads(static_cast<size_t>(2 * sums));
    const Bytes grad = elements(e, g.numel, false, 1.0f);
    k.learnable_range({&g, e, grad.data(), tame.data(), y.data(), start.data(), width.data(), 0, 255, grads.data()});
    add(e, y.data(), g.numel);  // the sums depend on the order, and so on the lanes
    tell("learnable_range");
  }
}

void masks(const Kernels& k) {
  const Element e = static_cast<Element>(pick(0, 3));
  const int m = static_cast<int>(pick(2, 32)), n = static_cast<int>(pick(1, m));
  const int64_t inner = chance(2) ? 1 : pick(1, 70), blocks = pick(1, 60) * kEnlarged, numel = blocks * m * inner;
  const Bytes x = elements(e, numel, chance(2), 1.0f);
  Bytes y(x.size());
  k.nm_mask({e, x.data(), y.data(), blocks, inner, n, m});
  add(e, y.data(), numel);
  tell("nm_mask");
  Bytes z(x.size());
  k.apply_mask(e, x.data(), y.data(), z.data(), numel);
  add(e, z.data(), numel);
  tell("apply_mask");
  const Bytes tame = elements(e, numel, false, 1.0f);
  uint64_t key = 0;
  std::memcpy(&key, tame.data() + pick(0, numel - 1) * size_of(e), static_cast<size_t>(size_of(e)));
  key &= ~(uint64_t{1} << (8 * size_of(e) - 1));
  add(static_cast<uint64_t>(k.topk_write(e, tame.data(), y.data(), numel, key, pick(0, 3))));
  add(e, y.data(), numel);
  tell("topk_write");
  std::vector<uint64_t> keys(static_cast<size_t>(numel + 64));
  std::vector<uint32_t> offsets(static_cast<size_t>(numel + 64));
  TopkSplit split = {e, tame.data(), y.data(), numel, key / 2, key, keys.data(), offsets.data(), numel + 64, 0, 0, 0};
  k.topk_split(split);
  add(static_cast<uint64_t>(split.count)), add(static_cast<uint64_t>(split.above));
  for (int64_t i = 0; i < split.count; ++i) add(offsets[static_cast<size_t>(i)]);
  tell("topk_split");
  const Element f = any_element();
  const Bytes weight = elements(f, numel, chance(3), 1.0f), grad = elements(f, numel, chance(3), 1.0f);
  std::vector<float> logits(static_cast<size_t>(numel)), to_logits(logits.size());
  for (float& v : logits) v = any_float(chance(50), 6.0f);
  Bytes out(weight.size());
  const uint64_t draw = next(), seed = next();
  k.sampled_mask({f, numel, weight.data(), logits.data(), nullptr, out.data(), nullptr, draw, seed});
  add(f, out.data(), numel);
  tell("sampled_mask");
  k.sampled_mask({f, numel, weight.data(), logits.data(), grad.data(), out.data(), to_logits.data(), draw, seed});
  add(f, out.data(), numel), add(to_logits);
  tell("sampled_mask_backward");
  const Layout layout = any_layout();
  const Bytes w = elements(e, layout.geometry.numel, chance(4), 1.0f);
  std::vector<double> norms(static_cast<size_t>(layout.geometry.blocks));
  k.block_norms(layout.geometry, e, w.data(), norms.data());
  add(norms);
  tell("block_norms");
}

void palettes(const Kernels& k) {
  const Layout layout = any_layout();
  const Geometry& g = layout.geometry;
  const int64_t clusters = chance(3) ? pick(1, 16) : chance(2) ? pick(17, 32) : pick(33, 256);
  const int64_t room = table_room(clusters);
  Bytes indices(static_cast<size_t>(g.numel));
  for (uint8_t& i : indices) i = static_cast<uint8_t>(pick(0, clusters - 1));
  for (const int64_t size : {2, 4, 8}) {
    const Bytes tables = elements(size == 2   ? Element::kFloat16
                                  : size == 4 ? Element::kFloat32
                                              : Element::kFloat64,
                                  g.blocks * room, true, 1.0f);
    Bytes out(static_cast<size_t>(g.numel * size));
    k.palettes.lookup({{&g, 1, g.numel}, table_kind(clusters), tables.data(), indices.data(), 8, out.data(), size});
    add(out);
  }
  tell("lookup");
  const Element e = any_element();
  const Bytes w = elements(e, g.numel, chance(3), 1.0f);
  std::vector<float> bounds(static_cast<size_t>(g.blocks * room), std::numeric_limits<float>::infinity());
  std::vector<int32_t> order(bounds.size());
  for (int64_t b = 0; b < g.blocks; ++b) {
    float at = -1.0f;
    for (int64_t j = 0; j + 1 < clusters; ++j)
      bounds[static_cast<size_t>(b * room + j)] = at += unit() * 3 / static_cast<float>(clusters);
    for (int64_t j = 0; j < room; ++j)
      order[static_cast<size_t>(b * room + j)] = static_cast<int32_t>(clusters - 1 - j < 0 ? 0 : clusters - 1 - j);
  }
  k.palettes.palettize({{&g, 1, g.numel}, clusters, e, w.data(), indices.data(), bounds.data(), order.data()});
  add(indices);
  tell("palettize");
  std::vector<double> sums(static_cast<size_t>(g.blocks * clusters));
  for (uint8_t& i : indices) i = static_cast<uint8_t>(pick(0, clusters - 1));
  k.palettes.sum_by_index({{&g, 1, g.numel}, clusters, e, w.data(), indices.data(), 0, g.numel, sums.data()});
  add(sums);
  tell("sum_by_index");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return std::fprintf(stderr, "usage: instruction_sets SET [CASES]\n"), 2;
  set_capability(arguments[1]);
  const int64_t cases = count > 2 ? std::atoll(arguments[2]) : 400;
  for (case_number = 0; case_number < cases; ++case_number) {
    state = static_cast<uint64_t>(case_number) * 1000003 + 17;
    quantization(kernels());
    masks(kernels());
    palettes(kernels());
  }
  return 0;
}
