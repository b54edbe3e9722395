// Operators on lists that are called with the same state again and again: it is handed over once, and named by a
// number from then on. To hand over hundreds of tensors takes longer than to quantize a small one of them.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <variant>

#include "lists.h"

namespace coreai {
namespace {

// What has to be as it was: dtypes and shapes of the inputs, and the values of switches, of one byte each.
class Guard {
 public:
  Guard() = default;
  Guard(const Tensors& inputs, const Tensors& switches) : is_set_(true), switches_(switches) {
    for (const Tensor& x : inputs) {
      types_.push_back(x.scalar_type());
      const auto sizes = x.sizes();
      sizes_.push_back(static_cast<int64_t>(sizes.size()));
      sizes_.insert(sizes_.end(), sizes.begin(), sizes.end());
    }
    for (const Tensor& one : switches_) {
      STD_TORCH_CHECK(one.is_cpu() && one.element_size() == 1 && one.numel() == 1,
                      "switches must be of one byte each, on the CPU");
      values_.push_back(value_of(one));
    }
  }
  bool holds(const Tensors& inputs) const {
    if (!is_set_) return true;
    if (inputs.size() != types_.size()) return false;
    const int64_t* expected = sizes_.data();
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto sizes = inputs[i].sizes();
      if (inputs[i].scalar_type() != types_[i] || static_cast<int64_t>(sizes.size()) != *expected++) return false;
      if (!std::equal(sizes.begin(), sizes.end(), expected)) return false;
      expected += sizes.size();
    }
    for (size_t i = 0; i < switches_.size(); ++i) {
      if (value_of(switches_[i]) != values_[i]) return false;
    }
    return true;
  }

 private:
  static uint8_t value_of(const Tensor& one) { return *static_cast<const uint8_t*>(one.const_data_ptr()); }

  bool is_set_ = false;
  std::vector<ScalarType> types_;
  std::vector<int64_t> sizes_;  // of each input its number of axes, then their sizes
  Tensors switches_;
  std::vector<uint8_t> values_;
};

// A list's state and settings. It is run by one thread at a time, as whoever shares its state has to anyway.
struct Kept {
  std::variant<AffineList, StepList> list;
  Guard guard;
  std::mutex mutex;

  template <class List>
  explicit Kept(List given) : list(std::move(given)) {}
};

class Registry {
 public:
  template <class List>
  int64_t add(List list) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.emplace(++last_, std::make_shared<Kept>(std::move(list)));
    return last_;
  }
  std::shared_ptr<Kept> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(number);
    STD_TORCH_CHECK(found != kept_.end(), "nothing is kept under number ", number);
    return found->second;
  }
  // Null if there is none. The caller lets go of the tensors, which may run anybody's code.
  std::shared_ptr<Kept> take(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(number);
    if (found == kept_.end()) return nullptr;
    auto kept = std::move(found->second);
    kept_.erase(found);
    return kept;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Kept>> kept_;
  int64_t last_ = 0;
};

// Never destroyed: at the end of the process torch may be gone before the tensors.
Registry& registry() {
  static auto* one = new Registry;
  return *one;
}

int64_t keep_fake_quantize(const Tensors& scales, const Tensors& zero_points, const Tensors& minvals,
                           const Blocks& block_sizes, int64_t format, double quant_min, double quant_max) {
  return registry().add(AffineList(scales, zero_points, minvals, block_sizes, format, quant_min, quant_max));
}

int64_t keep_observe_and_fake_quantize_(
    const Tensors& scales, const Tensors& zero_points, const Tensors& minvals,
    const Tensors& running_mins, const Tensors& running_maxs, bool has_running, const Blocks& block_sizes,
    int64_t scheme, int64_t format, double quant_min, double quant_max, bool use_minval, int64_t update,
    double averaging_constant, std::optional<double> range_min, std::optional<double> range_max, bool power_of_two) {
  const StepSettings settings = {has_running, scheme, format, quant_min, quant_max, use_minval, update, averaging_constant,
                                 range_min, range_max, power_of_two};
  return registry().add(StepList(scales, zero_points, minvals, running_mins, running_maxs, block_sizes, settings));
}

void guard_kept(const Tensors& inputs, const Tensors& switches, int64_t number) {
  const auto kept = registry().at(number);
  Guard guard(inputs, switches);
  const std::lock_guard<std::mutex> lock(kept->mutex);
  kept->guard = std::move(guard);
}

// No outputs if the guard does not hold.
std::tuple<Tensors, Tensor> run_kept(const Tensors& inputs, int64_t number, bool with_mask) {
  const auto kept = registry().at(number);
  const std::lock_guard<std::mutex> lock(kept->mutex);
  if (!kept->guard.holds(inputs)) return {Tensors(), empty(one_axis(0), ScalarType::Byte)};
  return std::visit([&](auto& list) { return list.run(inputs, with_mask); }, kept->list);
}

void drop_kept(int64_t number) { registry().take(number); }

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CPU, library) {
  library.impl("keep_fake_quantize", TORCH_BOX(&keep_fake_quantize));
  library.impl("keep_observe_and_fake_quantize_", TORCH_BOX(&keep_observe_and_fake_quantize_));
  library.impl("guard_kept", TORCH_BOX(&guard_kept));
  library.impl("run_kept", TORCH_BOX(&run_kept));
}

STABLE_TORCH_LIBRARY_IMPL(coreai_kernels, CompositeExplicitAutograd, library) {
  library.impl("drop_kept", TORCH_BOX(&drop_kept));
}

}  // namespace
}  // namespace coreai
