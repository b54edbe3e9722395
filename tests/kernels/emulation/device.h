// A GPU of one multiprocessor whose memory is the CPU's: operators for CUDA tensors take those of the CPU, under a name of
// their own; or the tensors of gpu.cpp, which has two.
#pragma once

#include <cstdint>
#include <string>

#if defined(COREAI_EMULATED_DEVICES)
#define COREAI_GPU_LIBRARY coreai_kernels, CUDA
#elif defined(COREAI_RECORDED)
#define COREAI_GPU_LIBRARY coreai_recorded, CPU
#else
#define COREAI_GPU_LIBRARY coreai_emulated, CPU
#endif

namespace coreai::cuda {
namespace {

#if defined(COREAI_EMULATED_DEVICES)
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) : before_(gpu_exchange_device(device)) {}
  ~DeviceGuard() { gpu_exchange_device(before_); }

 private:
  int32_t before_;
};
inline int current_stream(int32_t device) { return static_cast<int>(gpu_stream(device)); }
#else
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline int current_stream(int32_t) { return 0; }
#endif

#if defined(COREAI_RECORDED)
inline AOTITorchError empty_and_told(int64_t axes, const int64_t* sizes, const int64_t* strides, int32_t type,
                                     int32_t device_type, int32_t device, AtenTensorHandle* made) {
  const AOTITorchError error = aoti_torch_empty_strided(axes, sizes, strides, type, device_type, device, made);
  void* data = nullptr;
  int64_t bytes = 0;
  if (emulation::tell_memory && error == AOTI_TORCH_SUCCESS && aoti_torch_get_data_ptr(*made, &data) == AOTI_TORCH_SUCCESS &&
      aoti_torch_get_storage_size(*made, &bytes) == AOTI_TORCH_SUCCESS) {
    emulation::tell_memory(data, bytes);
  }
  return error;
}
#define aoti_torch_empty_strided empty_and_told
#endif

inline int64_t multiprocessors(int32_t) { return 1; }
inline std::string why_no_memory() { return "CUDA out of memory. There is no room for it: "; }
inline void check_launch(const char*) {}

}  // namespace
}  // namespace coreai::cuda
