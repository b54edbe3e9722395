// One histogram between the least and the greatest key leaves few candidates for the threshold.
#include "cpu/masks/select_few.h"

#include <algorithm>
#include <functional>
#include <memory>

namespace coreai::cpu {
namespace {

constexpr int kBins = 512;

struct Threshold {
  uint64_t key;
  int64_t ties;  // to be kept of the elements with that key
};

Threshold threshold_of(const uint64_t* keys, int64_t count, int64_t keep) {
  const auto [least, greatest] = std::minmax_element(keys, keys + count);
  const uint64_t low = *least;
  int shift = 0;
  while (((*greatest - low) >> shift) >= kBins) ++shift;
  uint32_t bins[kBins] = {};
  for (int64_t i = 0; i < count; ++i) ++bins[(keys[i] - low) >> shift];
  uint64_t bin = kBins - 1;
  for (; bins[bin] < keep; --bin) keep -= bins[bin];
  std::vector<uint64_t> candidates(bins[bin] + 1);
  size_t end = 0;
  for (int64_t i = 0; i < count; ++i) {  // without a branch: which keys are in the bin is random
    candidates[end] = keys[i];
    end += (keys[i] - low) >> shift == bin;
  }
  candidates.resize(end);
  const auto place = candidates.begin() + (keep - 1);
  std::nth_element(candidates.begin(), place, candidates.end(), std::greater<>());
  const uint64_t key = *place;
  return {key, keep - std::count_if(candidates.begin(), place, [&](uint64_t other) { return other > key; })};
}

}  // namespace

void write_few_masks(const std::vector<MaskTensor>& tensors, Element common, int64_t total, int64_t num_keep) {
  const std::unique_ptr<uint64_t[]> keys(new uint64_t[static_cast<size_t>(total)]);
  uint64_t* next = keys.get();
  for (const MaskTensor& t : tensors) {
    with_elements(t.element, common, [&]<Element kFrom, Element kTo>() {
      for (int64_t i = 0; i < t.numel; ++i) {
        *next++ = widen_key<kFrom, kTo>(magnitude_key<kFrom>(word_at<WordOf<kFrom>>(t.input, i)));
      }
    });
  }
  const Threshold found = threshold_of(keys.get(), total, num_keep);
  const uint64_t threshold = found.key;
  int64_t ties = found.ties;
  const uint64_t* key = keys.get();
  for (const MaskTensor& t : tensors) {
    with_element(t.element, [&]<Element kElement>() {
      auto* mask = static_cast<WordOf<kElement>*>(t.mask);
      for (int64_t i = 0; i < t.numel; ++i, ++key) {
        const bool tie = *key == threshold, kept = (*key > threshold) | (tie & (ties > 0));
        ties -= tie;
        mask[i] = kept ? Magnitude<kElement>::kOne : WordOf<kElement>{0};
      }
    });
  }
}

}  // namespace coreai::cpu
