// Tensors on a GPU as its kernels take them: the device's stream and size, outputs, block parameters.
// For the files that register operators, hence the unnamed namespace; `inline` for those that use a part of it.
#pragma once

#include "cuda/launch.cuh"
#include "ops/tensors.h"

#if defined(COREAI_EMULATED_THREADS)
#include "emulation/device.h"
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>

// Where operators are registered: library and dispatch key.
#define COREAI_GPU_LIBRARY coreai_kernels, CUDA
#endif

#define COREAI_REGISTER(library_and_key, variable) COREAI_REGISTER_AS(library_and_key, variable)
#define COREAI_REGISTER_AS(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)

namespace coreai::cuda {
namespace {

#if !defined(COREAI_EMULATED_THREADS)
// The current device is the tensor's while it lives.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of a device. Asked for once: afterwards it costs nothing, and captures of graphs come to no call that they forbid.
inline int64_t multiprocessors(int32_t device) {
  static std::array<std::atomic<int>, 128> known = {};
  std::atomic<int>& count = known.at(static_cast<size_t>(device));
  if (count.load(std::memory_order_relaxed) == 0) {
    int found = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "the GPU cannot be asked for its size: ", cudaGetErrorString(error));
    count.store(found, std::memory_order_relaxed);
  }
  return count.load(std::memory_order_relaxed);
}

inline std::string why_no_memory() {
  const cudaError_t error = cudaPeekAtLastError();
  if (error == cudaSuccess || error == cudaErrorMemoryAllocation) return "CUDA out of memory. There is no room for it: ";
  return std::string(cudaGetErrorString(error)) + ": ";
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  constexpr const char* kOld =
      ". These kernels are for GPUs of compute capability 8.0 and later, as far as TORCH_CUDA_ARCH_LIST named them when the "
      "package was built. To fix: COREAI_KERNELS_BACKEND=triton";
  STD_TORCH_CHECK(error == cudaSuccess, name, " could not be started: ", cudaGetErrorString(error),
                  error == cudaErrorNoKernelImageForDevice ? kOld : "");
}
#endif

// Blocks of threads that run at the same time, for kernels with up to 48 registers and 256 threads.
inline int64_t most_blocks(int32_t device) { return 5 * multiprocessors(device); }

struct Place {
  int32_t device_type, device;

  static Place of(const Tensor& x) {
    Place place = {0, x.get_device_index()};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &place.device_type));
    return place;
  }
  bool operator==(const Place&) const = default;
};

inline Tensor empty_at(const Place& place, const Ints& shape, const Ints& strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                              dtype_of(type), place.device_type, place.device, &handle);
  // The ABI does not tell torch's error, which loops look for that go on with smaller batches; or else these words.
  if (error != TORCH_SUCCESS) throw OutOfMemory(why_no_memory() + told(shape, type));
  return Tensor(handle);
}

inline Tensor empty_beside(const Tensor& x, const Ints& shape, const Ints& strides, ScalarType type) {
  return empty_at(Place::of(x), shape, strides, type);
}

inline Tensor empty_beside(const Tensor& x, const Ints& shape, ScalarType type) {
  return empty_beside(x, shape, contiguous_strides(shape), type);
}

// The packed mask; without bytes if it is not wanted.
inline Tensor empty_mask_beside(const Tensor& x, bool wanted) {
  return empty_beside(x, one_axis(wanted ? (x.numel() + 7) / 8 : 0), ScalarType::Byte);
}

// An input as kernels read it: its own memory if that is dense, else a copy in its memory format.
struct DeviceInput {
  Ints shape, strides, order;
  Tensor dense;

  explicit DeviceInput(const Tensor& input)
      : shape(to_ints(input.sizes())), strides(to_ints(input.strides())), order(memory_order(shape, strides)), dense(input) {
    is_copy_ = !is_dense(shape, strides, order);
    if (!is_copy_) return;
    dense = torch::stable::empty_like(input);
    torch::stable::copy_(dense, input);
    strides = to_ints(dense.strides());
    order = memory_order(shape, strides);
  }
  const void* data() const { return dense.const_data_ptr(); }
  // A fresh tensor that lies in memory as this does; the copy, where there is one and the type is its own.
  Tensor output(ScalarType type) const {
    return is_copy_ && type == dense.scalar_type() ? dense : empty_beside(dense, shape, strides, type);
  }

 private:
  bool is_copy_;
};

inline Tensor permuted(const Tensor& x, const Ints& order) {
  const std::vector<int64_t> axes(order.begin(), order.end());
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(axes)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool same_device(const Tensor& a, const Tensor& b) { return Place::of(a) == Place::of(b); }

// A parameter of blocks that kernels read, in memory order of the blocks: the tensor itself where that is row-major order.
inline Tensor in_memory_order(const char* name, const Tensor& values, ScalarType type, const DeviceInput& x,
                              const cpu::Layout& layout, const Blocks& block) {
  STD_TORCH_CHECK(same_device(values, x.dense), name, " must be on the input's device");
  STD_TORCH_CHECK(values.scalar_type() == type, name, " must be ", type == ScalarType::Int ? "int32" : "float32");
  STD_TORCH_CHECK(values.numel() == layout.geometry.blocks, name, " must have one value per block, that is ",
                  layout.geometry.blocks, "; it has ", values.numel());
  if (layout.block_index.empty()) return values.is_contiguous() ? values : torch::stable::contiguous(values);
  const Ints grid = grid_of(x.shape, block);
  const Tensor shaped = torch::stable::reshape(values, {grid.data(), grid.size()});
  return torch::stable::contiguous(permuted(shaped, x.order));
}

// The inverse: values that kernels wrote in memory order of the blocks, as a row-major tensor.
inline Tensor in_row_major(const Tensor& values, const DeviceInput& x, const cpu::Layout& layout, const Blocks& block) {
  if (layout.block_index.empty()) return values;
  const Ints grid = grid_of(x.shape, block);
  Ints in_memory(grid.size()), inverse(grid.size());
  for (size_t i = 0; i < grid.size(); ++i) {
    in_memory[i] = grid[static_cast<size_t>(x.order[i])];
    inverse[static_cast<size_t>(x.order[i])] = static_cast<int64_t>(i);
  }
  const Tensor shaped = torch::stable::reshape(values, {in_memory.data(), in_memory.size()});
  return torch::stable::contiguous(permuted(shaped, inverse));
}

template <class T>
T* data_of(const Optional& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

}  // namespace
}  // namespace coreai::cuda
