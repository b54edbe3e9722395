#include "cpu/palettes/kmeans_1d.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/palettes/split_windows.h"

namespace coreai::cpu {
namespace {

using std::size_t;

// Rows of this length or more are shared among threads.
constexpr int64_t kParallelRow = 1 << 15;
// From so many points on, bounds on where the splits are cost less than they save.
constexpr int64_t kWindowsFrom = 1 << 15;

// A row of the table: for each i in [first, last] the best last split, no less than `least`. It never decreases with
// i, so one bit for each i and one for each step up hold it: bit splits[i] - least + i - first is set.
class Staircase {
 public:
  Staircase(int64_t first, int64_t last, int64_t least)
      : first_(first), least_(least), words_(static_cast<size_t>((2 * last - first - least) / 64 + 1)) {}
  void add(int64_t i, int64_t split) {
    const auto bit = static_cast<uint64_t>(split - least_ + i - first_);
    words_[bit / 64] |= uint64_t{1} << (bit % 64);
  }
  int64_t split(int64_t i) const {
    int64_t rank = i - first_;
    size_t word = 0;
    for (;; ++word) {
      const int64_t ones = __builtin_popcountll(words_[word]);
      if (rank < ones) break;
      rank -= ones;
    }
    uint64_t rest = words_[word];
    for (; rank > 0; --rank) rest &= rest - 1;
    return static_cast<int64_t>(word * 64) + __builtin_ctzll(rest) - (i - first_) + least_;
  }

 private:
  int64_t first_, least_;
  std::vector<uint64_t> words_;
};

// Open ranges of i, and of the splits that come into question for them.
struct Range {
  int64_t low, high, least, most;
};

class Table {
 public:
  Table(const std::vector<double>& sums, const std::vector<double>& masses)
      : sums_(sums), masses_(masses), gain_(sums.size()), next_(sums.size()), splits_(sums.size()) {
    for (size_t i = 1; i < sums.size(); ++i) gain_[i] = sums[i] * sums[i] / masses[i];
  }

  // Adds a cluster: gains of the first i points for i in a window, with the last split in another.
  Staircase add(const Window& ends, const Window& splits) {
    std::vector<Range> ranges = {{ends.low, ends.high, splits.low, std::min(splits.high, ends.high - 1)}};
    if (ends.high - ends.low >= kParallelRow && threads() > 1) ranges = halve(std::move(ranges), 8 * threads());
    struct Context {
      Table* table;
      const std::vector<Range>* ranges;
    } context{this, &ranges};
    parallel(
        0, static_cast<int64_t>(ranges.size()), 1,
        [](int64_t begin, int64_t end, void* raw) {
          auto* c = static_cast<Context*>(raw);
          for (int64_t i = begin; i < end; ++i) c->table->solve((*c->ranges)[static_cast<size_t>(i)]);
        },
        &context);
    Staircase row(ends.low, ends.high, splits.low);
    for (int64_t i = ends.low; i <= ends.high; ++i) row.add(i, splits_[static_cast<size_t>(i)]);
    gain_.swap(next_);
    return row;
  }

 private:
  int64_t solve_middle(const Range& range) {
    const int64_t middle = (range.low + range.high) / 2;
    const auto i = static_cast<size_t>(middle);
    const int64_t split = best_split_(gain_.data(), sums_.data(), masses_.data(), sums_[i], masses_[i], range.least,
                                      std::min(range.most, middle - 1), &next_[i]);
    splits_[i] = static_cast<uint32_t>(split);
    return split;
  }

  std::vector<Range> halve(std::vector<Range> ranges, int64_t enough) {
    while (static_cast<int64_t>(ranges.size()) < enough) {
      std::vector<Range> halves;
      for (const Range& range : ranges) push_halves(range, solve_middle(range), halves);
      ranges.swap(halves);
    }
    return ranges;
  }

  static void push_halves(const Range& range, int64_t split, std::vector<Range>& out) {
    const int64_t middle = (range.low + range.high) / 2;
    if (middle < range.high) out.push_back({middle + 1, range.high, split, range.most});
    if (range.low < middle) out.push_back({range.low, middle - 1, range.least, split});
  }

  void solve(const Range& whole) {
    std::vector<Range> open = {whole};
    while (!open.empty()) {
      const Range range = open.back();
      open.pop_back();
      push_halves(range, solve_middle(range), open);
    }
  }

  const std::vector<double>&sums_, &masses_;
  std::vector<double> gain_, next_;
  std::vector<uint32_t> splits_;
  decltype(PaletteKernels::best_split) best_split_ = kernels().palettes.best_split;
};

double mean(const Points& points, size_t begin, size_t end) {
  double sum = 0, mass = 0;
  for (size_t i = begin; i < end; ++i) sum += points.values[i] * points.masses[i], mass += points.masses[i];
  return sum / mass;
}

}  // namespace

void best_centroids(const Points& points, int clusters, float* centroids) {
  const size_t count = points.values.size(), wanted = static_cast<size_t>(clusters);
  if (count <= wanted) {
    for (size_t i = 0; i < wanted; ++i) centroids[i] = static_cast<float>(points.values[std::min(i, count - 1)]);
    return;
  }
  const double center = mean(points, 0, count);
  const auto last = static_cast<int64_t>(count);
  const bool windowed = last >= kWindowsFrom && clusters > 2;
  PrefixSums sums{std::vector<double>(count + 1), std::vector<double>(count + 1), {}};
  if (windowed) sums.squares.resize(count + 1);
  for (size_t i = 0; i < count; ++i) {
    const double around = points.values[i] - center;
    sums.values[i + 1] = sums.values[i] + around * points.masses[i];
    sums.masses[i + 1] = sums.masses[i] + points.masses[i];
    if (windowed) sums.squares[i + 1] = sums.squares[i] + around * around * points.masses[i];
  }
  std::vector<Window> windows;
  if (windowed) windows = split_windows(sums, clusters);
  for (int64_t j = 1; !windowed && j < clusters; ++j) windows.push_back({j, last});
  windows.push_back({last, last});
  Table table(sums.values, sums.masses);
  std::vector<Staircase> rows;
  rows.reserve(wanted);
  for (size_t j = 1; j < wanted; ++j) rows.push_back(table.add(windows[j], windows[j - 1]));
  size_t end = count;
  for (size_t cluster = wanted; cluster-- > 0;) {
    const size_t begin = cluster == 0 ? 0 : static_cast<size_t>(rows[cluster - 1].split(static_cast<int64_t>(end)));
    centroids[cluster] = static_cast<float>(mean(points, begin, end));
    end = begin;
  }
}

}  // namespace coreai::cpu
