#include "cpu/masks/sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

namespace coreai::cpu {
namespace {

constexpr int kBins = 2048;
constexpr double kSampling = 0.75;  // size of the sample over that of the elements to the power of 2/3

// A number below `limit` (of 32 bits) that looks random: splitmix64's mixing of x, scaled.
uint64_t scaled(uint64_t x, uint64_t limit) {
  x = (x + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (x >> 32) * limit >> 32;
}

// Keys at one random place in each of equal stretches.
std::vector<uint64_t> sample(const std::vector<MaskTensor>& tensors, Element common, int64_t total, int64_t count) {
  const int64_t stretch = total / count;
  std::vector<uint64_t> keys(static_cast<size_t>(count));
  int64_t first = 0;  // of the tensor at hand
  auto tensor = tensors.begin();
  for (int64_t i = 0; i < count; first += tensor->numel, ++tensor) {
    with_elements(tensor->element, common, [&]<Element kFrom, Element kTo>() {
      for (; i < count; ++i) {
        const int64_t index =
            i * stretch + static_cast<int64_t>(scaled(static_cast<uint64_t>(i), static_cast<uint64_t>(stretch)));
        if (index >= first + tensor->numel) return;
        const auto bits = word_at<WordOf<kFrom>>(tensor->input, index - first);
        keys[static_cast<size_t>(i)] = widen_key<kFrom, kTo>(magnitude_key<kFrom>(bits));
      }
    });
  }
  return keys;
}

}  // namespace

// A band around the threshold's rank in a sample: three standard deviations of a binomial distribution to
// either side.
Band likely_band(const std::vector<MaskTensor>& tensors, Element common, int64_t total, int64_t num_keep) {
  const double root = std::cbrt(static_cast<double>(total));
  const auto count = static_cast<int64_t>(std::clamp(root * root * kSampling, 1024.0, 65536.0));
  std::vector<uint64_t> keys = sample(tensors, common, total, count);
  const double share = static_cast<double>(num_keep) / static_cast<double>(total);
  const double rank = share * static_cast<double>(count);
  const double margin = 3.0 * std::sqrt(rank * (1.0 - share)) + 3.0;
  const auto upper = static_cast<int64_t>(rank - margin), lower = static_cast<int64_t>(rank + margin);
  // Only keys whose leading bits may be those of the two ranks need sorting.
  const int shift = key_bits(common) - 11;
  std::array<int64_t, kBins> bins = {};
  for (const uint64_t key : keys) ++bins[key >> shift];
  int64_t before = 0, skipped = 0;
  uint64_t first = kBins, last = kBins;  // bins from the top
  while (last > 0 && before <= lower) {
    before += bins[--last];
    if (before <= upper) skipped = before, first = last;
  }
  const auto end =
      std::partition(keys.begin(), keys.end(), [&](uint64_t key) { return key >> shift >= last && key >> shift < first; });
  const auto at = [&](int64_t place) {
    const auto position = keys.begin() + (place - skipped);
    std::nth_element(keys.begin(), position, end, std::greater<>());
    return *position;
  };
  return {lower < count ? at(lower) : 0, upper >= 0 ? at(upper) : nan_key(common)};
}

}  // namespace coreai::cpu
