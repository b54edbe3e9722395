// Lists of tensors: the arguments that their operators have in common, and how they are run.
// For the files that register operators on lists, hence the unnamed namespace.
#pragma once

#include <deque>
#include <tuple>
#include <utility>

#include "ops/jobs.h"

namespace coreai {
namespace {

using Tensors = std::vector<Tensor>;

// Masks start at multiples of this many bytes, which is what vector loads on a GPU ask for.
constexpr int64_t kMaskAlignment = 16;

// The packed masks of a list, one behind the other in one tensor.
struct Masks {
  Tensor bits;
  std::vector<uint8_t*> starts;  // null: not wanted
};

inline Masks empty_masks(const Tensors& inputs, bool wanted) {
  std::vector<int64_t> starts(1, 0);
  for (const Tensor& x : inputs) {
    const int64_t bytes = (x.numel() + 7) / 8;
    starts.push_back(starts.back() + (bytes + kMaskAlignment - 1) / kMaskAlignment * kMaskAlignment);
  }
  Masks masks = {empty(one_axis(wanted ? starts.back() : 0), ScalarType::Byte), {}};
  uint8_t* data = bytes_of(masks.bits);
  for (size_t i = 0; i < inputs.size(); ++i) {
    masks.starts.push_back(data ? data + starts[i] : nullptr);
    if (data) std::fill(data + starts[i] + (inputs[i].numel() + 7) / 8, data + starts[i + 1], uint8_t{0});
  }
  return masks;
}

// The next `count` values of a list of lists written one after the other.
class Reader {
 public:
  Reader(const char* name, const std::vector<int64_t>& values) : name_(name), values_(&values) {}
  Ints take(size_t count) {
    STD_TORCH_CHECK(at_ + count <= values_->size(), name_, " must have one entry for each axis of each tensor");
    const int64_t* first = values_->data() + at_;
    at_ += count;
    return Ints(first, first + count);
  }

 private:
  const char* name_;
  const std::vector<int64_t>* values_;
  size_t at_ = 0;
};

inline bool equal(const Ints& one, const Ints& other) {
  return std::equal(one.begin(), one.end(), other.begin(), other.end());
}

// Layouts of a list's tensors. Those of one shape, memory order and block size share one.
class Layouts {
 public:
  const cpu::Layout& of(const Operand& x, const Ints& block) {
    // The layers of a model have few shapes, and mostly the one before.
    const size_t recent = std::min<size_t>(known_.size(), kRecent);
    for (size_t i = 1; i <= recent; ++i) {
      const Known& one = known_[known_.size() - i];
      if (equal(one.shape, x.shape) && equal(one.order, x.order) && equal(one.block, block)) return one.layout;
    }
    known_.push_back({x.shape, x.order, block, cpu::make_layout(x.shape, x.order, Blocks(block.begin(), block.end()))});
    return known_.back().layout;
  }

 private:
  static constexpr size_t kRecent = 8;
  struct Known {
    Ints shape, order, block;
    cpu::Layout layout;
  };
  std::deque<Known> known_;  // references to its entries stay valid
};

inline void check_length(const char* name, const Tensors& values, const Tensors& inputs, bool optional) {
  STD_TORCH_CHECK(values.size() == inputs.size() || (optional && values.empty()), name,
                  " must have one tensor for each input, that is ", inputs.size(), "; it has ", values.size());
}

inline Optional optional_at(const Tensors& values, size_t i) { return values.empty() ? Optional() : Optional(values[i]); }

// The jobs of a list. With several threads, large tensors take all of them one after the other; of the small ones
// each thread takes some whole. A single thread runs each job as it comes, while what it needs is in the caches.
template <class Job>
class Jobs {
 public:
  template <class... Args>
  void add(Args&&... args) {
    if (at_once_) {
      Job job(std::forward<Args>(args)...);
      job.run();
      job.write_back();
    } else {
      jobs_.emplace_back(std::forward<Args>(args)...);
    }
  }
  void finish() {
    Small small;
    int64_t total = 0;
    for (const Job& job : jobs_) {
      if (job.numel() >= kLarge) {
        job.run();
        continue;
      }
      small.jobs.push_back(&job);
      small.starts.push_back(total);
      total += job.numel();
    }
    cpu::parallel(
        0, total, cpu::kParallelElements,
        [](int64_t begin, int64_t end, void* context) {
          const auto& todo = *static_cast<const Small*>(context);
          for (size_t i = 0; i < todo.jobs.size(); ++i) {
            if (begin <= todo.starts[i] && todo.starts[i] < end) todo.jobs[i]->run();
          }
        },
        &small);
    for (Job& job : jobs_) job.write_back();
  }

 private:
  struct Small {
    std::vector<const Job*> jobs;
    std::vector<int64_t> starts;  // in elements, as if they lay one after the other
  };
  static constexpr int64_t kLarge = 1 << 17;  // elements of a tensor that takes all threads
  const bool at_once_ = cpu::threads() == 1;
  std::deque<Job> jobs_;
};

// Fake quantization with the parameters given.
class AffineList {
 public:
  AffineList(Tensors scales, Tensors zero_points, Tensors minvals, Blocks block_sizes, int64_t format, double quant_min,
             double quant_max)
      : scales_(std::move(scales)),
        zero_points_(std::move(zero_points)),
        minvals_(std::move(minvals)),
        block_sizes_(std::move(block_sizes)),
        format_(format),
        quant_min_(quant_min),
        quant_max_(quant_max) {}

  std::tuple<Tensors, Tensor> run(const Tensors& inputs, bool with_mask) {
    check_length("scales", scales_, inputs, false);
    check_length("zero_points", zero_points_, inputs, true);
    check_length("minvals", minvals_, inputs, true);
    const Masks masks = empty_masks(inputs, with_mask);
    Reader blocks("block_sizes", block_sizes_);
    Jobs<FakeQuantizeJob> jobs;
    Tensors outputs;
    outputs.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      Operand x(inputs[i], inputs[i].scalar_type());
      jobs.add(x, layouts_.of(x, blocks.take(x.shape.size())), scales_[i], optional_at(zero_points_, i),
               optional_at(minvals_, i), format_, quant_min_, quant_max_, masks.starts[i]);
      outputs.push_back(std::move(x.output));
    }
    jobs.finish();
    return {std::move(outputs), masks.bits};
  }

 private:
  Tensors scales_, zero_points_, minvals_;
  Blocks block_sizes_;
  int64_t format_;
  double quant_min_, quant_max_;
  Layouts layouts_;
};

// The whole step of fake quantizers.
class StepList {
 public:
  StepList(Tensors scales, Tensors zero_points, Tensors minvals, Tensors running_mins, Tensors running_maxs,
           QuantConfig config, bool has_running)
      : scales_(std::move(scales)),
        zero_points_(std::move(zero_points)),
        minvals_(std::move(minvals)),
        running_mins_(std::move(running_mins)),
        running_maxs_(std::move(running_maxs)),
        config_(std::move(config)),
        has_running_(has_running) {}

  std::tuple<Tensors, Tensor> run(const Tensors& inputs, bool with_mask) {
    check_length("scales", scales_, inputs, false);
    check_length("zero_points", zero_points_, inputs, true);
    check_length("minvals", minvals_, inputs, true);
    check_length("running_mins", running_mins_, inputs, true);
    check_length("running_maxs", running_maxs_, inputs, true);
    const Masks masks = empty_masks(inputs, with_mask);
    Reader blocks("block_sizes", config_.block_size);
    Jobs<StepJob> jobs;
    Tensors outputs;
    outputs.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      Operand x(inputs[i], inputs[i].scalar_type());
      jobs.add(x, layouts_.of(x, blocks.take(x.shape.size())),
               StepState{scales_[i], optional_at(zero_points_, i), optional_at(minvals_, i), optional_at(running_mins_, i),
                         optional_at(running_maxs_, i)},
               config_, has_running_, masks.starts[i]);
      outputs.push_back(std::move(x.output));
    }
    jobs.finish();
    return {std::move(outputs), masks.bits};
  }

 private:
  Tensors scales_, zero_points_, minvals_, running_mins_, running_maxs_;
  QuantConfig config_;
  bool has_running_;
  Layouts layouts_;
};

}  // namespace
}  // namespace coreai
