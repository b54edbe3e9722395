// Operators on lists of tensors: one call, and one set of threads, for many small ones.
#include <torch/csrc/stable/library.h>

#include <deque>
#include <tuple>

#include "jobs.h"

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

Masks empty_masks(const Tensors& inputs, bool wanted) {
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

bool equal(const Ints& one, const Ints& other) {
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

void check_length(const char* name, const Tensors& values, const Tensors& inputs, bool optional) {
  STD_TORCH_CHECK(values.size() == inputs.size() || (optional && values.empty()), name,
                  " must have one tensor for each input, that is ", inputs.size(), "; it has ", values.size());
}

Optional optional_at(const Tensors& values, size_t i) { return values.empty() ? Optional() : Optional(values[i]); }

// Large tensors take all threads one after the other; of the small ones each thread takes some whole.
template <class Job>
void run_all(std::deque<Job>& jobs) {
  struct Small {
    std::vector<const Job*> jobs;
    std::vector<int64_t> starts;  // in elements, as if they lay one after the other
  } small;
  int64_t total = 0;
  for (const Job& job : jobs) {
    if (job.numel() >= cpu::kParallelElements) {
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
}

std::tuple<Tensors, Tensor> foreach_fake_quantize_forward(const Tensors& inputs, const Tensors& scales,
                                                          const Tensors& zero_points, const Tensors& minvals,
                                                          const Blocks& block_sizes, int64_t format, double quant_min,
                                                          double quant_max, bool with_mask) {
  check_length("scales", scales, inputs, false);
  check_length("zero_points", zero_points, inputs, true);
  check_length("minvals", minvals, inputs, true);
  const Masks masks = empty_masks(inputs, with_mask);
  Reader blocks("block_sizes", block_sizes);
  Layouts layouts;
  std::deque<FakeQuantizeJob> jobs;
  Tensors outputs;
  outputs.reserve(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    Operand x(inputs[i], inputs[i].scalar_type());
    jobs.emplace_back(x, layouts.of(x, blocks.take(x.shape.size())), scales[i], optional_at(zero_points, i),
                      optional_at(minvals, i), format, quant_min, quant_max, masks.starts[i]);
    outputs.push_back(std::move(x.output));
  }
  run_all(jobs);
  return {std::move(outputs), masks.bits};
}

Tensors foreach_fake_quantize_backward(const Tensors& grads, const Tensor& mask, const std::vector<int64_t>& starts,
                                       const std::vector<int64_t>& orders) {
  STD_TORCH_CHECK(starts.size() == grads.size(), "starts must have one entry for each gradient");
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  Reader axes("orders", orders);
  std::deque<MaskedGradientJob> jobs;
  Tensors results;
  results.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto dim = static_cast<size_t>(grads[i].dim());
    const Ints order = orders.empty() ? natural_order(dim) : axes.take(dim);
    STD_TORCH_CHECK(starts[i] >= 0 && starts[i] + (grads[i].numel() + 7) / 8 <= mask.numel(),
                    "mask must have one bit per element of each gradient");
    results.push_back(jobs.emplace_back(grads[i], order, bits + starts[i]).output());
  }
  run_all(jobs);
  return results;
}

std::tuple<Tensors, Tensor> foreach_observe_and_fake_quantize_(
    const Tensors& inputs, const Tensors& scales, const Tensors& zero_points, const Tensors& minvals,
    const Tensors& running_mins, const Tensors& running_maxs, bool has_running, const Blocks& block_sizes,
    int64_t scheme, int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update,
    double averaging_constant, std::optional<double> range_min, std::optional<double> range_max, bool power_of_two,
    bool with_mask) {
  check_length("scales", scales, inputs, false);
  check_length("zero_points", zero_points, inputs, true);
  check_length("minvals", minvals, inputs, true);
  check_length("running_mins", running_mins, inputs, true);
  check_length("running_maxs", running_maxs, inputs, true);
  const Masks masks = empty_masks(inputs, with_mask);
  const StepSettings settings = {has_running, scheme,    format,    quant_min,   quant_max, use_minval,
                                 update,      averaging_constant, range_min, range_max, power_of_two};
  Reader blocks("block_sizes", block_sizes);
  Layouts layouts;
  std::deque<StepJob> jobs;
  Tensors outputs;
  outputs.reserve(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    Operand x(inputs[i], inputs[i].scalar_type());
    jobs.emplace_back(settings, x, layouts.of(x, blocks.take(x.shape.size())),
                      StepState{scales[i], optional_at(zero_points, i), optional_at(minvals, i),
                                optional_at(running_mins, i), optional_at(running_maxs, i)},
                      masks.starts[i]);
    outputs.push_back(std::move(x.output));
  }
  run_all(jobs);
  for (StepJob& job : jobs) job.write_back();
  return {std::move(outputs), masks.bits};
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  library.impl("foreach_fake_quantize_forward", TORCH_BOX(&foreach_fake_quantize_forward));
  library.impl("foreach_fake_quantize_backward", TORCH_BOX(&foreach_fake_quantize_backward));
  library.impl("foreach_observe_and_fake_quantize_", TORCH_BOX(&foreach_observe_and_fake_quantize_));
}

}  // namespace
}  // namespace coreai
