// Two GPUs for a torch without CUDA: tensors that torch takes for CUDA tensors, in the CPU's memory. Torch's operators for
// them are the CPU's, on the same memory. Who listens is told what is allocated and launched, on which device and stream,
// and when the host would wait for a device.
//
// Streams are numbers, and nothing runs beside anything else.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto kGPU = c10::DeviceType::CUDA;
constexpr DeviceIndex kDevices = 2;

thread_local DeviceIndex used_device = 0;
thread_local std::array<c10::StreamId, kDevices> used_streams = {};

bool listening = false, exhausted = false;
std::mutex mutex;
std::ostringstream heard;

void tell(const std::string& what) {
  if (!listening) return;
  const std::lock_guard<std::mutex> one_at_a_time(mutex);
  const auto device = static_cast<size_t>(used_device);
  heard << what << " on " << device << ", stream " << used_streams[device] << '\n';
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kGPU; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kGPU, used_device); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) used_device = device.index();
  }
  Stream getStream(Device device) const override {
    const auto index = device.has_index() ? device.index() : used_device;
    return Stream(Stream::UNSAFE, Device(kGPU, index), used_streams[static_cast<size_t>(index)]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = getStream(stream.device());
    used_streams[static_cast<size_t>(stream.device_index())] = stream.id();
    return before;
  }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override { *event = this_event(); }
  void block(void*, const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

 private:
  static void* this_event() {
    static int event;
    return &event;
  }
};
const c10::impl::DeviceGuardImplRegistrar with_torch(kGPU, new Guard);

// Whom autograd's engine asks whether there is a GPU. Under the name that torch looks for.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return used_device; }
  void setCurrentDevice(DeviceIndex device) const override { used_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(used_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    tell("memory");
    TORCH_CHECK_WITH(OutOfMemoryError, !exhausted, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    void* data = std::aligned_alloc(256, (bytes + 256) / 256 * 256);
    return {data, data, &std::free, Device(kGPU, used_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

c10::DeviceGuard guard_of(std::optional<Device> device) {
  return c10::DeviceGuard(device && device->has_index() ? *device : Device(kGPU, used_device));
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto guard = guard_of(device);
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(type),
                                   format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const auto guard = guard_of(device);
  return at::detail::empty_strided_generic(sizes, strides, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(type));
}

const Tensor& resize(const Tensor& x, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const size_t bytes = static_cast<size_t>(impl->numel() + impl->storage_offset()) * impl->itemsize();
  auto storage = impl->storage();
  if (storage.nbytes() < bytes) {
    const auto guard = guard_of(x.device());
    storage.set_data_ptr_noswap(memory.allocate(bytes));
    storage.set_nbytes(bytes);
  }
  return x;
}

Tensor on_cpu(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  return at::from_blob(x.mutable_data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU));
}

Tensor on_gpu(const Tensor& y, Device device) {
  return at::for_blob(y.mutable_data_ptr(), y.sizes())
      .strides(y.strides())
      .options(y.options().device(device))
      .target_device(device)
      .deleter([y](void*) {})
      .make_tensor();
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.device() != from.device() && !non_blocking) tell("wait");
  Tensor target = on_cpu(to);
  target.copy_(on_cpu(from));
  return to;
}

at::Scalar item(const Tensor& x) {
  tell("wait");
  return on_cpu(x).item();
}

// What an operator of the CPU's makes of the same memory. New tensors are the device's.
void by_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  std::vector<std::pair<Tensor, Tensor>> same;
  Device device(kGPU, used_device);
  const auto convert = [&](const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    device = x.device();
    same.emplace_back(on_cpu(x), x);
    return same.back().first;
  };
  const size_t begin = stack->size() - count;
  for (size_t i = begin; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(convert(x));
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().has_index()) device = value.toDevice();
      value = Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto result = [&](const Tensor& y) -> Tensor {
    for (const auto& [mine, given] : same) {
      if (mine.is_same(y)) return given;
    }
    return y.defined() ? on_gpu(y, device) : y;
  };
  for (c10::IValue& value : *stack) {
    if (value.isTensor()) {
      value = result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& y : value.toTensorVector()) list.push_back(result(y));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("resize_", TORCH_FN(resize));
  library.impl("copy_", TORCH_FN(copy));
  library.impl("_local_scalar_dense", TORCH_FN(item));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
}

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// For the operators that are emulated, and the tests.
extern "C" {
int32_t gpu_exchange_device(int32_t device) {
  const int32_t before = used_device;
  used_device = static_cast<DeviceIndex>(device);
  return before;
}
int64_t gpu_stream(int32_t device) { return used_streams[static_cast<size_t>(device)]; }
void gpu_use_stream(int32_t device, int64_t stream) { used_streams[static_cast<size_t>(device)] = stream; }
void gpu_launched(int64_t stream) { tell("launch by " + std::to_string(stream)); }
void gpu_listen(bool on) { listening = on; }
void gpu_exhaust(bool on) { exhausted = on; }
// What has been heard since the last time: a line each.
const char* gpu_heard() {
  static std::string text;
  text = heard.str();
  heard.str("");
  return text.c_str();
}
}
