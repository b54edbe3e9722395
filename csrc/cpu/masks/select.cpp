// How the largest are found in little more than one pass over memory:
//
// 1. A sample gives a band of keys [low, high] that holds the threshold, most likely, and a few per cent of the
//    elements.
// 2. One pass writes the mask as if the threshold were `high`, counts the ones, and lists the elements in the band.
// 3. The counts tell for certain whether the threshold is in the band. Its place among the listed elements is then
//    known; those above it, and as many of those equal to it as are left to keep, are entered in the mask.
//
// Where the sample misled, or ties fill the list, a radix select finds the threshold in passes over all elements.
// Small tensors are another matter: see select_few.cpp.
#include "cpu/masks/select.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>

#include "cpu/masks/sample.h"
#include "cpu/masks/select_few.h"
#include "cpu/parallel_for.h"

namespace coreai::cpu {
namespace {

constexpr int64_t kPiece = 1 << 17;       // elements of a piece: what a thread takes at a time
constexpr int64_t kWithoutSample = 8192;  // elements that need none
constexpr int kBins = 2048;

Element common_element(const std::vector<MaskTensor>& tensors) {
  Element common = tensors.front().element;
  for (const MaskTensor& t : tensors) {
    if (t.element == Element::kFloat64) return t.element;
    if (t.element != common) common = Element::kFloat32;
  }
  return common;
}

// Elements of a tensor that a thread takes at a time, and what was found there.
struct Piece {
  const MaskTensor* tensor;
  int64_t begin, length;
  TopkSplit split;
  std::unique_ptr<uint64_t[]> keys;
  std::unique_ptr<uint32_t[]> offsets;
  int64_t ties, quota;
  size_t listed_end;  // of this piece's keys among those of all pieces in one bin
};

class Selection {
 public:
  Selection(const std::vector<MaskTensor>& tensors, int64_t num_keep)
      : tensors_(tensors), common_(common_element(tensors)), num_keep_(num_keep) {
    for (const MaskTensor& t : tensors) {
      for (int64_t begin = 0; begin < t.numel; begin += kPiece) {
        pieces_.push_back({&t, begin, std::min(kPiece, t.numel - begin), {}, nullptr, nullptr, 0, 0, 0});
      }
      total_ += t.numel;
      row_major_ = row_major_ && t.order.empty();
    }
  }

  bool run() {
    if (num_keep_ == 0 || num_keep_ == total_) {
      fill(num_keep_ != 0);
      return true;
    }
    const bool few = total_ <= kWithoutSample;
    const Band band = few ? Band{0, nan_key(common_)} : likely_band(tensors_, common_, total_, num_keep_);
    if (split(band) && above_ <= num_keep_ && num_keep_ <= above_ + listed_) {
      if (num_keep_ > above_) enter(band, num_keep_ - above_);
      return true;
    }
    if (!row_major_) return false;
    select_exactly();
    return true;
  }

 private:
  template <class Body>
  void over_pieces(Body body) {
    parallel_for(static_cast<int64_t>(pieces_.size()), 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) body(pieces_[static_cast<size_t>(begin)]);
    });
  }

  // As many shares of the pieces as there are threads, each with bins of its own; their sum.
  template <class Body>
  std::vector<int64_t> histogram(Body body) {
    const auto count = static_cast<int64_t>(pieces_.size());
    const int64_t parts = std::min(count, std::max<int64_t>(1, threads()));
    std::vector<int64_t> bins(static_cast<size_t>(parts * kBins));
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t i = part * count / parts; i < (part + 1) * count / parts; ++i) {
          body(pieces_[static_cast<size_t>(i)], bins.data() + part * kBins);
        }
      }
    });
    for (int64_t i = kBins; i < parts * kBins; ++i) bins[static_cast<size_t>(i % kBins)] += bins[static_cast<size_t>(i)];
    bins.resize(kBins);
    return bins;
  }

  void fill(bool ones) {
    over_pieces([&](Piece& p) {
      with_element(p.tensor->element, [&]<Element kElement>() {
        auto* mask = static_cast<WordOf<kElement>*>(p.tensor->mask) + p.begin;
        std::fill_n(mask, p.length, ones ? Magnitude<kElement>::kOne : WordOf<kElement>{0});
      });
    });
  }

  // False if too many elements are in the band.
  bool split(Band band) {
    const int64_t limit = total_ <= kWithoutSample ? total_ : std::max(kWithoutSample, total_ / 4);
    std::atomic<int64_t> room = limit;
    over_pieces([&](Piece& p) {
      const Element element = p.tensor->element;
      with_element(element, [&]<Element kElement>() {
        using Word = WordOf<kElement>;
        TopkSplit& s = p.split;
        s = {element,
             static_cast<const Word*>(p.tensor->input) + p.begin,
             static_cast<Word*>(p.tensor->mask) + p.begin,
             p.length,
             narrow_key(element, common_, band.low),
             narrow_key_down(element, common_, band.high),
             nullptr,
             nullptr,
             0,
             0,
             0,
             0};
        for (int64_t capacity = p.length / 16 + 256; s.done < p.length && room.load() >= 0; capacity *= 2) {
          grow(p, capacity, sizeof(Word));
          const int64_t before = s.count;
          kernels().topk_split(s);
          room -= s.count - before;
        }
      });
    });
    above_ = listed_ = 0;
    for (const Piece& p : pieces_) above_ += p.split.above, listed_ += p.split.count;
    return room.load() >= 0;
  }

  static void grow(Piece& p, int64_t capacity, size_t size) {
    TopkSplit& s = p.split;
    std::unique_ptr<uint64_t[]> keys(new uint64_t[(static_cast<size_t>(capacity) * size + 7) / 8]);
    std::unique_ptr<uint32_t[]> offsets(new uint32_t[static_cast<size_t>(capacity)]);
    if (s.count > 0) {
      std::memcpy(keys.get(), s.keys, static_cast<size_t>(s.count) * size);
      std::memcpy(offsets.get(), s.offsets, static_cast<size_t>(s.count) * sizeof(uint32_t));
    }
    p.keys = std::move(keys), p.offsets = std::move(offsets);
    s.keys = p.keys.get(), s.offsets = p.offsets.get(), s.capacity = capacity;
  }

  // body(key in the common type, offset in the piece) of the listed elements.
  template <class Body>
  void over_listed(const Piece& p, Body body) {
    with_elements(p.tensor->element, common_, [&]<Element kFrom, Element kTo>() {
      for (int64_t i = 0; i < p.split.count; ++i) {
        const auto key = word_at<WordOf<kFrom>>(p.split.keys, i);
        body(static_cast<uint64_t>(widen_key<kFrom, kTo>(key)), p.split.offsets[i]);
      }
    });
  }

  // Key of the listed element of rank `keep`, and how many of the elements with that key are to be kept. Counts
  // those of each piece.
  uint64_t threshold_of_listed(Band band, int64_t keep, int64_t& ties) {
    int shift = 0;
    while (((band.high - band.low) >> shift) >= kBins) ++shift;
    const auto bins = histogram([&](const Piece& p, int64_t* counts) {
      over_listed(p, [&](uint64_t key, uint32_t) { ++counts[(key - band.low) >> shift]; });
    });
    uint64_t bin = kBins - 1;
    for (; bins[bin] < keep; --bin) keep -= bins[bin];
    const auto size = static_cast<size_t>(bins[bin]);
    std::vector<uint64_t> keys(size + 1), ranked;
    size_t end = 0;
    for (Piece& p : pieces_) {
      over_listed(p, [&](uint64_t key, uint32_t) {  // without a branch: which keys are in the bin is random
        keys[end] = key;
        end += (key - band.low) >> shift == bin;
      });
      p.listed_end = end;
    }
    keys.resize(size);
    ranked = keys;
    const auto place = ranked.begin() + (keep - 1);
    std::nth_element(ranked.begin(), place, ranked.end(), std::greater<>());
    const uint64_t threshold = *place;
    ties = keep - std::count_if(ranked.begin(), place, [&](uint64_t key) { return key > threshold; });
    auto from = keys.begin();
    for (Piece& p : pieces_) {
      const auto to = keys.begin() + static_cast<std::ptrdiff_t>(p.listed_end);
      p.ties = std::count(from, to, threshold);
      from = to;
    }
    return threshold;
  }

  // The `keep` first of the listed elements into the mask.
  void enter(Band band, int64_t keep) {
    int64_t ties = 0;
    const uint64_t threshold = threshold_of_listed(band, keep, ties);
    if (!row_major_) return enter_by_index(threshold, ties);
    for (Piece& p : pieces_) {
      p.quota = std::min(ties, p.ties);
      ties -= p.quota;
    }
    over_pieces([&](Piece& p) {
      enter_if(p, [&, left = p.quota](uint64_t key, uint32_t) mutable {
        const bool tie = key == threshold, kept = (key > threshold) | (tie & (left > 0));
        left -= tie;
        return kept;
      });
    });
  }

  template <class Wanted>
  void enter_if(const Piece& p, Wanted wanted) {
    with_element(p.tensor->element, [&]<Element kElement>() {
      using Word = WordOf<kElement>;
      auto* mask = static_cast<Word*>(p.tensor->mask) + p.begin;
      over_listed(p, [&](uint64_t key, uint32_t offset) {
        mask[offset] = static_cast<Word>(Magnitude<kElement>::kOne * static_cast<Word>(wanted(key, offset)));
      });
    });
  }

  // Where the memory is in another order than the indices, those of the ties have to be compared.
  void enter_by_index(uint64_t threshold, int64_t ties) {
    std::vector<int64_t> indices, tied;
    over_all_listed([&](const Piece& p, int64_t first) {
      over_listed(p, [&](uint64_t key, uint32_t offset) {
        if (key == threshold) indices.push_back(first + row_major_index(*p.tensor, p.begin + offset));
      });
    });
    tied = indices;
    std::nth_element(tied.begin(), tied.begin() + (ties - 1), tied.end());
    const int64_t last = tied[static_cast<size_t>(ties - 1)];
    auto next = indices.begin();
    over_all_listed([&](const Piece& p, int64_t) {
      enter_if(p, [&](uint64_t key, uint32_t) { return key > threshold || (key == threshold && *next++ <= last); });
    });
  }

  // body(piece, index of its tensor's first element among all), in order.
  template <class Body>
  void over_all_listed(Body body) {
    int64_t first = 0;
    for (const Piece& p : pieces_) {
      body(p, first);
      if (p.begin + p.length == p.tensor->numel) first += p.tensor->numel;
    }
  }

  static int64_t row_major_index(const MaskTensor& t, int64_t offset) {
    if (t.order.empty()) return offset;
    Ints position(t.shape.size());
    for (size_t i = t.order.size(); i-- > 0;) {
      const auto axis = static_cast<size_t>(t.order[i]);
      position[axis] = offset % t.shape[axis];
      offset /= t.shape[axis];
    }
    int64_t index = 0;
    for (size_t axis = 0; axis < t.shape.size(); ++axis) index = index * t.shape[axis] + position[axis];
    return index;
  }

  void select_exactly() {
    uint64_t threshold = 0;
    int64_t keep = num_keep_;
    for (int shift = key_bits(common_); shift > 0;) {
      const int bits = std::min(shift, 11);
      shift -= bits;
      const uint64_t prefix = threshold >> (shift + bits);
      const auto bins = histogram([&](const Piece& p, int64_t* counts) {
        with_elements(p.tensor->element, common_, [&]<Element kFrom, Element kTo>() {
          const auto* x = static_cast<const WordOf<kFrom>*>(p.tensor->input) + p.begin;
          for (int64_t i = 0; i < p.length; ++i) {
            const uint64_t key = widen_key<kFrom, kTo>(magnitude_key<kFrom>(x[i]));
            if (key >> (shift + bits) == prefix) ++counts[key_digit(key, shift, bits)];
          }
        });
      });
      int bin = (1 << bits) - 1;
      for (; bins[static_cast<size_t>(bin)] < keep; --bin) keep -= bins[static_cast<size_t>(bin)];
      threshold |= static_cast<uint64_t>(bin) << shift;
    }
    write_exactly(threshold, keep);
  }

  // Twice where ties are kept: first to count those of each piece.
  void write_exactly(uint64_t threshold, int64_t ties) {
    over_pieces([&](Piece& p) {
      p.quota = 0;
      p.ties = write_piece(p, threshold);
    });
    for (Piece& p : pieces_) {
      p.quota = std::min(ties, p.ties);
      ties -= p.quota;
    }
    over_pieces([&](Piece& p) {
      if (p.quota > 0) write_piece(p, threshold);
    });
  }

  int64_t write_piece(const Piece& p, uint64_t threshold) {
    return with_elements(p.tensor->element, common_, [&]<Element kFrom, Element kTo>() -> int64_t {
      using Word = WordOf<kFrom>;
      const auto* x = static_cast<const Word*>(p.tensor->input) + p.begin;
      auto* mask = static_cast<Word*>(p.tensor->mask) + p.begin;
      const uint64_t own = narrow_key_down(kFrom, kTo, threshold);
      const int64_t equal = kernels().topk_write(kFrom, x, mask, p.length, own, p.quota);
      // A narrower type need not have a value that equals the threshold.
      return widen_key<kFrom, kTo>(static_cast<Word>(own)) == threshold ? equal : 0;
    });
  }

  const std::vector<MaskTensor>& tensors_;
  const Element common_;
  const int64_t num_keep_;
  std::vector<Piece> pieces_;
  int64_t total_ = 0, above_ = 0, listed_ = 0;
  bool row_major_ = true;
};

}  // namespace

bool write_topk_masks(const std::vector<MaskTensor>& tensors, int64_t num_keep) {
  if (tensors.empty()) return true;
  int64_t total = 0;
  bool row_major = true;
  for (const MaskTensor& t : tensors) total += t.numel, row_major = row_major && t.order.empty();
  if (total <= kWithoutSample && row_major && 0 < num_keep && num_keep < total) {
    write_few_masks(tensors, common_element(tensors), total, num_keep);
    return true;
  }
  return Selection(tensors, num_keep).run();
}

}  // namespace coreai::cpu
