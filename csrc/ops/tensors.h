// Tensors of the stable ABI as the kernels take them: shapes, memory orders, outputs, block parameters.
// For the files that register operators, hence the unnamed namespace; `inline` for those that use a part of it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/geometry.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace coreai {
namespace {

using cpu::Ints;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Blocks = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

inline Ints to_ints(torch::headeronly::IntHeaderOnlyArrayRef values) { return Ints(values.begin(), values.end()); }

inline Optional owned(AtenTensorHandle handle) { return handle ? Optional(Tensor(handle)) : std::nullopt; }

inline Ints one_axis(int64_t size) { return Ints(1, size); }

inline Element element_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Double:
      return Element::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline cpu::Storage storage_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Char:
      return cpu::Storage::kInt8;
    case ScalarType::Byte:
      return cpu::Storage::kUInt8;
    case ScalarType::Float8_e4m3fn:
      return cpu::Storage::kE4M3;
    case ScalarType::Float8_e5m2:
      return cpu::Storage::kE5M2;
    case ScalarType::Float:
      return cpu::Storage::kFloat32;
    case ScalarType::BFloat16:
      return cpu::Storage::kBFloat16;
    case ScalarType::Half:
      return cpu::Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be int8, uint8, float8_e4m3fn, float8_e5m2, float32, bfloat16 or float16");
  }
}

// Memory that there is not; `COREAI_IMPL` adds for which operator.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// As the ABI names it.
inline int32_t dtype_of(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

inline std::string told(const Ints& shape, ScalarType type) {
  std::ostringstream text;
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(type)));
  for (const int64_t size : shape) bytes *= size;
  text << "a result of " << bytes << " bytes, " << type << " of shape [";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "], cannot be allocated";
  return text.str();
}

template <size_t size>
struct Name {
  char text[size];
  constexpr Name(const char (&literal)[size]) { std::copy_n(literal, size, text); }
};

template <auto boxed, Name name>
void named(StableIValue* stack, uint64_t arguments, uint64_t results) {
  try {
    boxed(stack, arguments, results);
  } catch (const OutOfMemory& error) {
    throw std::runtime_error(std::string("coreai_kernels::") + name.text + ": " + error.what());
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(std::string("coreai_kernels::") + name.text + ": out of memory");
  }
}

// Registers a function as the operator of that name in the block's `library`.
#define COREAI_IMPL(name, function) library.impl(name, named<&TORCH_BOX(function), name>)

inline Tensor empty(const Ints& shape, const Ints& strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                              dtype_of(type), aoti_torch_device_type_cpu(), 0, &handle);
  if (error != TORCH_SUCCESS) throw OutOfMemory("out of memory: " + told(shape, type));
  Tensor tensor(handle);
  cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

inline Ints contiguous_strides(const Ints& shape) {
  Ints strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  return strides;
}

inline Tensor empty(const Ints& shape, ScalarType type) { return empty(shape, contiguous_strides(shape), type); }

inline Ints grid_of(const Ints& shape, const Blocks& block) {
  Ints grid(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) grid[i] = shape[i] / block[i];
  return grid;
}

inline Ints natural_order(size_t axes) {
  Ints order(axes);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

inline bool is_dense(const Ints& shape, const Ints& strides, const Ints& order) {
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const auto axis = static_cast<size_t>(order[i]);
    if (shape[axis] == 1) continue;
    if (strides[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

// The axes from the outermost in memory to the innermost; axes of size one come last, in order.
inline Ints memory_order(const Ints& shape, const Ints& strides) {
  Ints order = natural_order(shape.size());
  if (is_dense(shape, strides, order)) return order;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
    if (shape[i] == 1 || shape[j] == 1) return shape[i] != 1 && shape[j] == 1;
    return strides[i] > strides[j];
  });
  return order;
}

// float64 is computed in float32: operators convert, call themselves and convert back.
inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
inline Tensor to_float(const Tensor& x) { return torch::stable::to(x, ScalarType::Float); }
inline Tensor to_double(const Tensor& x) { return torch::stable::to(x, ScalarType::Double); }
inline Optional to_float(const Optional& x) { return x ? Optional(to_float(*x)) : x; }

// An input, a fresh output in the input's memory format, and the memory that kernels read: the input's own if it
// is dense; else the output, into which the input was copied.
struct Operand {
  Ints shape, order;
  Tensor output;
  const void* data;

  Operand(const Tensor& input, ScalarType output_type) : Operand(input, output_type, to_ints(input.strides())) {}

 private:
  Operand(const Tensor& input, ScalarType output_type, const Ints& strides)
      : shape(to_ints(input.sizes())), order(memory_order(shape, strides)), output(input), data(nullptr) {
    if (is_dense(shape, strides, order)) {
      output = empty(shape, strides, output_type);
      data = input.const_data_ptr();
      return;
    }
    dense_ = torch::stable::empty_like(input);
    torch::stable::copy_(*dense_, input);
    const Ints dense_strides = to_ints(dense_->strides());
    order = memory_order(shape, dense_strides);
    output = output_type == input.scalar_type() ? *dense_ : empty(shape, dense_strides, output_type);
    data = dense_->const_data_ptr();
  }
  std::optional<Tensor> dense_;
};

// A block parameter in memory order of the blocks: the tensor itself where that is row-major order.
template <class T>
class BlockValues {
 public:
  BlockValues(const Tensor& tensor, const Blocks& index, bool read) : tensor_(&tensor), index_(&index) {
    auto* data = static_cast<T*>(tensor.mutable_data_ptr());
    if (index.empty() && tensor.is_contiguous()) {
      data_ = data;
      return;
    }
    STD_TORCH_CHECK(tensor.is_contiguous(), "block parameters must be contiguous");
    copy_.resize(index.size());
    data_ = copy_.data();
    for (size_t i = 0; read && i < index.size(); ++i) copy_[i] = data[index[i]];
  }
  BlockValues(const BlockValues&) = delete;

  T* data() { return data_; }
  void write_back() {
    if (copy_.empty()) return;
    auto* data = static_cast<T*>(tensor_->mutable_data_ptr());
    for (size_t i = 0; i < index_->size(); ++i) data[(*index_)[i]] = copy_[i];
  }

 private:
  const Tensor* tensor_;
  const Blocks* index_;
  std::vector<T> copy_;
  T* data_;
};

template <class T>
T* data_or_null(std::optional<BlockValues<T>>& values) {
  return values ? values->data() : nullptr;
}

inline void check_block_values(const char* name, const Tensor& values, ScalarType type, int64_t blocks) {
  STD_TORCH_CHECK(values.is_cpu(), name, " must be on the CPU, as the input is");
  STD_TORCH_CHECK(values.scalar_type() == type, name, " must be ", type == ScalarType::Int ? "int32" : "float32");
  STD_TORCH_CHECK(values.numel() == blocks, name, " must have one value per block, that is ", blocks, "; it has ",
                  values.numel());
}

inline Tensor empty_mask(int64_t numel, bool wanted) {
  return empty(one_axis(wanted ? (numel + 7) / 8 : 0), ScalarType::Byte);
}

inline uint8_t* bytes_of(const Tensor& mask) {
  return mask.numel() == 0 ? nullptr : static_cast<uint8_t*>(mask.mutable_data_ptr());
}

// Scale, zero point and offset as the kernels take them.
class AffineValues {
 public:
  AffineValues(const cpu::Layout& layout, const Tensor& scale, const Optional& zero_point, const Optional& minval,
               int64_t format, double low, double high) {
    const int64_t blocks = layout.geometry.blocks;
    check_block_values("scale", scale, ScalarType::Float, blocks);
    scale_.emplace(scale, layout.block_index, true);
    if (zero_point) {
      check_block_values("zero_point", *zero_point, ScalarType::Int, blocks);
      zero_point_.emplace(*zero_point, layout.block_index, true);
    }
    if (minval) {
      check_block_values("minval", *minval, ScalarType::Float, blocks);
      minval_.emplace(*minval, layout.block_index, true);
    }
    affine = {static_cast<Format>(format),
              static_cast<float>(low),
              static_cast<float>(high),
              scale_->data(),
              data_or_null(zero_point_),
              data_or_null(minval_),
              minval ? static_cast<float>(low) : 0.0f};
  }
  cpu::Affine affine;

 private:
  std::optional<BlockValues<float>> scale_, minval_;
  std::optional<BlockValues<int32_t>> zero_point_;
};

inline Tensor as_float32(const Tensor& x) {
  const Tensor converted = x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

// A constant as the input's type holds it.
inline float rounded_to(double value, ScalarType type) {
  if (type == ScalarType::Half) return static_cast<float>(torch::headeronly::Half(static_cast<float>(value)));
  if (type == ScalarType::BFloat16) return static_cast<float>(torch::headeronly::BFloat16(static_cast<float>(value)));
  return static_cast<float>(value);
}

// The running range is kept in the input's type. Kernels read and write it there if its blocks lie in memory order, else
// a copy in float32.
class RunningValues {
 public:
  RunningValues(const char* name, const Optional& tensor, ScalarType type, const cpu::Layout& layout, bool read)
      : tensor_(tensor) {
    if (!tensor) return;
    const int64_t blocks = layout.geometry.blocks;
    STD_TORCH_CHECK(tensor->numel() == blocks && tensor->scalar_type() == type, name,
                    " must have the input's dtype and one value per block (", blocks, ")");
    STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
    if (type == ScalarType::Float) {
      values_.emplace(*tensor, layout.block_index, read);
      return;
    }
    if (layout.block_index.empty()) {
      own_ = tensor_->mutable_data_ptr();
      return;
    }
    index_ = &layout.block_index;
    wide_.resize(static_cast<size_t>(blocks));
    if (!read) return;
    type == ScalarType::Half ? widen<torch::headeronly::Half>() : widen<torch::headeronly::BFloat16>();
  }
  void* data() {
    if (own_) return own_;
    return values_ ? values_->data() : wide_.empty() ? nullptr : wide_.data();
  }
  // Type of what `data` points to.
  Element element() const { return own_ ? element_of("running range", *tensor_) : Element::kFloat32; }
  void write_back() {
    if (values_) values_->write_back();
    if (wide_.empty()) return;
    tensor_->scalar_type() == ScalarType::Half ? narrow<torch::headeronly::Half>() : narrow<torch::headeronly::BFloat16>();
  }

 private:
  // By hand: torch's conversion of a few values takes longer than quantizing some thousands.
  size_t place_of(size_t i) const { return static_cast<size_t>((*index_)[i]); }
  template <class T>
  void widen() {
    const auto* data = static_cast<const T*>(tensor_->const_data_ptr());
    for (size_t i = 0; i < wide_.size(); ++i) wide_[i] = static_cast<float>(data[place_of(i)]);
  }
  template <class T>
  void narrow() {
    auto* data = static_cast<T*>(tensor_->mutable_data_ptr());
    for (size_t i = 0; i < wide_.size(); ++i) data[place_of(i)] = static_cast<T>(wide_[i]);
  }

  Optional tensor_;
  std::optional<BlockValues<float>> values_;  // float32: the tensor's own memory where that is possible
  void* own_ = nullptr;                       // other types: the same
  std::vector<float> wide_;                   // other types in another order
  const Blocks* index_ = nullptr;
};

}  // namespace
}  // namespace coreai
