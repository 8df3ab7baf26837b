// Tensors as the kernels need them: checked, dense, with their layout read as (outer, channels, inner). Shared by the
// bindings of all devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels/channel_shape.h"
#include "../kernels/parameters.h"

namespace gdfq::binding {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ElementType element_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " has elements of an unsupported type; convert it to float32, float16 or bfloat16");
  }
}

// A tensor whose size-1 dimensions make it both contiguous and channels_last counts as contiguous.
inline MemoryFormat dense_format(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return MemoryFormat::Contiguous;
  std::int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return MemoryFormat::Contiguous;
    expected *= tensor.size(dim);
  }
  return MemoryFormat::ChannelsLast;
}

// The tensor itself where it already lies in that layout.
inline Tensor in_format(const Tensor& tensor, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(tensor, format);
}

inline Tensor empty_in_format(const Tensor& like, MemoryFormat format) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_floats(const Tensor& like, std::int64_t length) {
  return torch::stable::new_empty(like, {length}, ScalarType::Float);
}

inline Tensor empty_scalar(const Tensor& like) { return torch::stable::new_empty(like, {}, ScalarType::Float); }

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The channels of a dense tensor along `axis`; -1 makes one channel of the whole.
inline ChannelShape channel_shape(const Tensor& dense, std::int64_t axis) {
  if (axis == -1) return ChannelShape::of(dense.numel(), 1, 1);
  return ChannelShape::of(dense.numel(), dense.size(axis), dense.stride(axis));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(), name,
                  " is on another device than the input; move it there");
}

// A parameter of an op: `count` contiguous float32 values on the device of x.
inline const float* parameter(const char* name, const Tensor& tensor, std::int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(tensor.numel() == count, name, " has ", tensor.numel(), " elements where ", count, " are needed");
  check_device(name, tensor, x);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* parameter(const char* name, const std::optional<Tensor>& tensor, std::int64_t count,
                              const Tensor& x) {
  return tensor.has_value() ? parameter(name, *tensor, count, x) : nullptr;
}

inline const std::int64_t* checked_labels(const Tensor& labels, std::int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous() && labels.numel() == count,
                  "labels must be ", count, " contiguous int64");
  check_device("labels", labels, x);
  return static_cast<const std::int64_t*>(labels.const_data_ptr());
}

inline int checked_bits(std::int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits is ", bits, "; it must be 2..8");
  return static_cast<int>(bits);
}

inline Scheme checked_scheme(std::int64_t scheme) {
  STD_TORCH_CHECK(scheme >= 0 && scheme <= 2, "scheme is ", scheme,
                  "; it must be 0 (eq6), 1 (affine) or 2 (symmetric)");
  return static_cast<Scheme>(scheme);
}

inline Activation checked_activation(std::int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= 2, "act is ", act, "; it must be 0 (none), 1 (ReLU) or 2 (ReLU6)");
  return static_cast<Activation>(act);
}

}  // namespace gdfq::binding
