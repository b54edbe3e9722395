// The distinct values of a block with their masses: by counting where values are few, else by sorting.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/palettes/kmeans_1d.h"

namespace coreai::cpu {
namespace {

using std::size_t;

constexpr int64_t kPatterns = 1 << 16;
// Counts that nobody reads: neighbours that are left out go to different ones, so that none waits for the one before.
constexpr int64_t kUnread = 16;
// Blocks from this size on count all 65,536 patterns; sorting fewer elements is quicker than clearing the counts.
constexpr int64_t kCountFrom = 1 << 14;
constexpr int64_t kParallelCount = 1 << 20;
// Rounded values within so many steps are counted, too.
constexpr int64_t kSteps = 1 << 20;

float from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

uint32_t to_bits(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof(result));
  return result;
}

float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return from_bits(sign | magnitude | 0x7f800000);
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

float widen(float x) { return x; }

struct Rounding {
  bool rounds;
  float power;
  // Numpy's: a product and a quotient, each rounded to float32.
  float operator()(float x) const { return rounds ? std::nearbyint(x * power) / power : x; }
};

bool weight_is_valid(float weight) { return weight >= 0 && std::isfinite(weight); }

bool any_weight(const Samples& samples) {
  for (int64_t i = 0; i < samples.count; ++i) {
    if (samples.weights[i] > 0) return true;
  }
  return false;
}

bool any_kept(const Samples& samples) {
  return std::any_of(samples.kept, samples.kept + samples.count, [](uint8_t kept) { return kept != 0; });
}

template <class T>
void count_patterns(const T* values, int64_t count, uint32_t* counts) {
  for (int64_t i = 0; i < count; ++i) ++counts[values[i].bits];
}

// Without branches, which random zeros would mispredict, and in two loops, of which the first is for vectors.
template <class T>
void count_kept_patterns(const T* values, const uint8_t* kept, int64_t count, uint32_t* counts) {
  constexpr int64_t kPiece = 256;
  uint32_t places[kPiece];
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t size = std::min(kPiece, count - start);
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t skip = kept[start + i] != 0 ? 0 : ~uint32_t{0};
      const auto unread = static_cast<uint32_t>(kPatterns + i % kUnread);
      places[i] = (values[start + i].bits & ~skip) | (unread & skip);
    }
    for (int64_t i = 0; i < size; ++i) ++counts[places[i]];
  }
}

// Counts of all bit patterns, on several threads: whole numbers, so their order does not matter.
template <class T>
void count_patterns(const T* values, const uint8_t* kept, int64_t count, std::vector<double>& masses) {
  constexpr int64_t kCounts = kPatterns + kUnread;
  const int64_t parts = count < kParallelCount ? 1 : threads();
  std::vector<uint32_t> counts(static_cast<size_t>(parts * kCounts));
  struct Context {
    const T* values;
    const uint8_t* kept;
    int64_t count, parts;
    uint32_t* counts;
  } context{values, kept, count, parts, counts.data()};
  parallel(
      0, parts, 1,
      [](int64_t begin, int64_t end, void* raw) {
        auto* c = static_cast<Context*>(raw);
        for (int64_t part = begin; part < end; ++part) {
          uint32_t* own = c->counts + part * kCounts;
          const int64_t first = c->count * part / c->parts, size = c->count * (part + 1) / c->parts - first;
          if (c->kept == nullptr) {
            count_patterns(c->values + first, size, own);
          } else {
            count_kept_patterns(c->values + first, c->kept + first, size, own);
          }
        }
      },
      &context);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < kPatterns; ++i)
      masses[static_cast<size_t>(i)] += counts[static_cast<size_t>(part * kCounts + i)];
  }
}

template <class T>
bool points_of_patterns(const Samples& samples, const float* weights, Points& points) {
  const auto* values = static_cast<const T*>(samples.values);
  std::vector<double> masses(kPatterns);
  if (weights == nullptr) {
    count_patterns(values, samples.kept, samples.count, masses);
  } else {
    // A value that no element has any mass at is left out, but must be finite.
    std::vector<bool> seen(kPatterns);
    for (int64_t i = 0; i < samples.count; ++i) {
      masses[values[i].bits] += weights[i];
      seen[values[i].bits] = true;
    }
    for (size_t i = 0; i < seen.size(); ++i) {
      if (seen[i] && !std::isfinite(widen(T{static_cast<uint16_t>(i)}))) return false;
    }
  }
  const Rounding round{samples.rounds, samples.power};
  for (int i = 0; i < kPatterns; ++i) {
    // Negative values from the largest magnitude down, then the others: ascending.
    const auto bits = static_cast<uint16_t>(i < kPatterns / 2 ? 0xffff - i : i - kPatterns / 2);
    if (masses[bits] == 0) continue;
    const float value = round(widen(T{bits})) + 0.0f;
    if (!std::isfinite(value)) return false;
    points.add(value, masses[bits]);
  }
  return true;
}

// Float32 as an unsigned number of the same order; both zeros are one.
uint32_t ordered(float x) {
  const uint32_t bits = to_bits(x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

float unordered(uint32_t key) { return from_bits(key ^ (key >> 31 != 0 ? 0x80000000u : 0xffffffffu)); }

// The key in the upper half; below it the weight's bits.
using Item = uint64_t;

uint32_t key_of(uint32_t item) { return item; }
uint32_t key_of(Item item) { return static_cast<uint32_t>(item >> 32); }

// Stable, by 11 bits at a time.
template <class T>
void radix_sort(std::vector<T>& items) {
  constexpr int kBits = 11, kPasses = 3;
  constexpr size_t kBuckets = size_t{1} << kBits;
  std::vector<size_t> counts(kPasses * kBuckets);
  for (const T item : items) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass * kBuckets + (key_of(item) >> pass * kBits) % kBuckets];
  }
  std::unique_ptr<T[]> other(new T[items.size()]);
  T *from = items.data(), *to = other.get();
  for (int pass = 0; pass < kPasses; ++pass) {
    size_t* start = &counts[pass * kBuckets];
    size_t total = 0;
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) total += std::exchange(start[bucket], total);
    for (size_t i = 0; i < items.size(); ++i) to[start[(key_of(from[i]) >> pass * kBits) % kBuckets]++] = from[i];
    std::swap(from, to);
  }
  if (from != items.data()) std::copy(from, from + items.size(), items.data());
}

template <class T>
bool points_by_sorting(const Samples& samples, const float* weights, Points& points) {
  const auto* values = static_cast<const T*>(samples.values);
  const Rounding round{samples.rounds, samples.power};
  const auto count = static_cast<size_t>(samples.count);
  bool finite = true;
  if (weights == nullptr) {
    std::vector<uint32_t> keys(count);
    size_t size = 0;
    for (size_t i = 0; i < count; ++i) {
      const bool kept = samples.kept == nullptr || samples.kept[i] != 0;
      const float value = round(widen(values[i]));
      finite &= !kept || std::isfinite(value);
      keys[size] = ordered(value);
      size += kept;
    }
    if (!finite) return false;
    keys.resize(size);
    radix_sort(keys);
    points.reserve(size);
    for (const uint32_t key : keys) points.add(unordered(key), 1.0);
    return true;
  }
  std::vector<Item> items(count);
  for (size_t i = 0; i < count; ++i) {
    const float value = round(widen(values[i]));
    finite &= std::isfinite(value);
    items[i] = static_cast<Item>(ordered(value)) << 32 | to_bits(weights[i]);
  }
  if (!finite) return false;
  radix_sort(items);
  points.reserve(count);
  for (const Item item : items) {
    const float weight = from_bits(static_cast<uint32_t>(item));
    if (weight > 0) points.add(unordered(key_of(item)), weight);
  }
  return true;
}

// Values that round to whole numbers of steps within a narrow range are counted by the step. False if they do not.
bool points_of_steps(const Samples& samples, const float* weights, Points& points) {
  const auto* values = static_cast<const float*>(samples.values);
  float low = 0, high = 0;
  bool finite = true;
  const auto is_kept = [&](int64_t i) { return samples.kept == nullptr || samples.kept[i] != 0; };
  for (int64_t i = 0; i < samples.count; ++i) {
    const float value = is_kept(i) ? values[i] : 0.0f;
    low = std::min(low, value);
    high = std::max(high, value);
    finite &= std::isfinite(value);
  }
  const float first = std::nearbyint(low * samples.power), last = std::nearbyint(high * samples.power);
  if (!finite || !(std::max(-first, last) < kSteps / 2)) return false;
  const auto offset = static_cast<int32_t>(first);
  const auto steps = static_cast<size_t>(static_cast<int32_t>(last) - offset + 1);
  if (static_cast<int64_t>(steps) > 4 * samples.count) return false;
  std::vector<double> masses(steps);
  for (int64_t i = 0; i < samples.count; ++i) {
    // Rounds to a whole number, ties to even, where magnitudes are below 2^22; and a library call less.
    const float whole = (is_kept(i) ? values[i] : 0.0f) * samples.power + 0x1.8p23f - 0x1.8p23f;
    const auto step = static_cast<int32_t>(whole);
    masses[static_cast<size_t>(step - offset)] += weights == nullptr ? is_kept(i) : weights[i];
  }
  for (size_t step = 0; step < steps; ++step) {
    if (masses[step] > 0) {
      points.add(static_cast<float>(static_cast<int32_t>(step) + offset) / samples.power, masses[step]);
    }
  }
  return true;
}

template <class T>
bool points_of(const Samples& samples, const float* weights, Points& points) {
  if constexpr (sizeof(T) == 2) {
    if (samples.count >= kCountFrom) return points_of_patterns<T>(samples, weights, points);
  } else if (samples.rounds && points_of_steps(samples, weights, points)) {
    return true;
  }
  return points_by_sorting<T>(samples, weights, points);
}

}  // namespace

bool distinct_points(const Samples& all, Points& points) {
  points.clear();
  Samples samples = all;
  if (samples.kept != nullptr && !any_kept(samples)) samples.kept = nullptr;
  const float* weights = samples.weights;
  if (weights != nullptr) {
    for (int64_t i = 0; i < samples.count; ++i) {
      if (!weight_is_valid(weights[i])) return false;
    }
    if (!any_weight(samples)) weights = nullptr;
  }
  switch (samples.element) {
    case Element::kBFloat16:
      return points_of<BFloat16>(samples, weights, points);
    case Element::kFloat16:
      return points_of<Float16>(samples, weights, points);
    default:
      return points_of<float>(samples, weights, points);
  }
}

}  // namespace coreai::cpu
