// The CPU kernels as PyTorch operators. Schemas, fake kernels and autograd are Python's; here arguments are checked,
// outputs allocated and the kernels called on PyTorch's threads.
#include <tuple>
#include <vector>

#include "../cpu/batch_norm_act_fake_quantize.h"
#include "../cpu/batch_norm_act_moments.h"
#include "../cpu/fake_quantize.h"
#include "../cpu/fake_quantize_weight.h"
#include "../cpu/observe_range.h"
#include "tensors.h"

namespace gdfq::binding {
namespace {

void run_on_torch_threads(std::int64_t count, cpu::Parallel::Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, /*grain_size=*/1, body, context));
}

constexpr cpu::Parallel kTorchThreads{run_on_torch_threads};

// An input that every kernel reads: dense, with its layout and element type.
struct Input {
  Input(const char* name, const Tensor& given)
      : type(element_type(name, given)), format(dense_format(given)), tensor(in_format(given, format)) {}

  const void* data() const { return tensor.const_data_ptr(); }
  Tensor empty_like() const { return empty_in_format(tensor, format); }

  cpu::ElementType type;
  MemoryFormat format;
  Tensor tensor;
};

// A gradient is read along with x, so it takes the type and the layout of x.
Tensor gradient_like(const Tensor& gradient, const Input& x) {
  STD_TORCH_CHECK(gradient.numel() == x.tensor.numel(), "grad_y has ", gradient.numel(), " elements and x has ",
                  x.tensor.numel(), "; they must have the same shape");
  if (gradient.scalar_type() == x.tensor.scalar_type()) return in_format(gradient, x.format);
  return in_format(torch::stable::to(gradient, x.tensor.scalar_type()), x.format);
}

// x of shape (N, C, ...) and the frozen batch normalization of its C channels.
struct NormalizedInput : Input {
  NormalizedInput(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : Input("x", x), shape(channels_of(tensor)) {
    norm.running_mean = parameter("running_mean", running_mean, shape.channels, x);
    norm.running_var = parameter("running_var", running_var, shape.channels, x);
    norm.weight = parameter("weight", weight, shape.channels, x);
    norm.bias = parameter("bias", bias, shape.channels, x);
    norm.epsilon = static_cast<float>(eps);
  }

  static cpu::ChannelShape channels_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 2, "x has ", x.dim(), " dimensions; batch normalization needs (N, C, ...)");
    return channel_shape(x, 1);
  }

  cpu::ChannelShape shape;
  cpu::FrozenBatchNorm norm;
};

struct Ranges {
  const float* lower;
  const float* upper;
  int bits;
};

Ranges ranges(const Tensor& lower, const Tensor& upper, std::int64_t bits, std::int64_t count, const Tensor& x) {
  return {parameter("lower", lower, count, x), parameter("upper", upper, count, x), checked_bits(bits)};
}

cpu::ChannelShape channels_along(const Tensor& x, std::int64_t axis) {
  STD_TORCH_CHECK(axis >= -1 && axis < x.dim(), "axis is ", axis, "; it must be -1 or a dimension of x, which has ",
                  x.dim());
  return channel_shape(x, axis);
}

Tensor fake_quantize(const Tensor& x, const Tensor& lower, const Tensor& upper, std::int64_t bits, std::int64_t axis) {
  const Input input("x", x);
  const cpu::ChannelShape shape = channels_along(input.tensor, axis);
  const Ranges range = ranges(lower, upper, bits, shape.channels, x);
  Tensor y = input.empty_like();
  cpu::fake_quantize(input.data(), y.mutable_data_ptr(), input.type, shape, range.lower, range.upper, range.bits,
                     kTorchThreads);
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_clipped(const Tensor& x, const Tensor& lower, const Tensor& upper,
                                                 std::int64_t bits, std::int64_t axis) {
  const Input input("x", x);
  const cpu::ChannelShape shape = channels_along(input.tensor, axis);
  const Ranges range = ranges(lower, upper, bits, shape.channels, x);
  Tensor y = input.empty_like();
  Tensor mask = empty_1d(x, (x.numel() + 7) / 8, ScalarType::Byte);
  cpu::fake_quantize_clipped(input.data(), y.mutable_data_ptr(), static_cast<std::uint8_t*>(mask.mutable_data_ptr()),
                             input.type, shape, range.lower, range.upper, range.bits, kTorchThreads);
  return {y, mask};
}

Tensor fake_quantize_clipped_backward(const Tensor& grad_y, const Tensor& mask) {
  const Input input("grad_y", grad_y);
  const std::int64_t bytes = (grad_y.numel() + 7) / 8;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == bytes,
                  "mask must be ", bytes, " contiguous uint8, as fake_quantize_clipped returned it");
  Tensor grad_x = input.empty_like();
  cpu::fake_quantize_clipped_backward(input.data(), static_cast<const std::uint8_t*>(mask.const_data_ptr()),
                                      grad_x.mutable_data_ptr(), input.type, grad_y.numel(), kTorchThreads);
  return grad_x;
}

std::vector<Tensor> fake_quantize_weights(const std::vector<Tensor>& weights, const std::vector<std::int64_t>& bits) {
  STD_TORCH_CHECK(weights.size() == bits.size(), "there are ", weights.size(), " weights and ", bits.size(),
                  " bits; give one for each weight");
  std::vector<Input> inputs;
  std::vector<Tensor> quantized;
  std::vector<cpu::Weight> tasks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].dim() >= 1, "a weight has no dimensions; it needs its output channels first");
    inputs.emplace_back("weight", weights[i]);  // keeps a copy made dense alive
    const Input& input = inputs.back();
    quantized.push_back(input.empty_like());
    const std::int64_t channels = input.tensor.size(0);
    const std::int64_t length = channels == 0 ? 0 : input.tensor.numel() / channels;
    tasks.push_back({input.data(), quantized.back().mutable_data_ptr(), input.type, channels, length,
                     checked_bits(bits[i])});
  }
  cpu::fake_quantize_weights(tasks, kTorchThreads);
  return quantized;
}

Tensor fake_quantize_weight(const Tensor& weight, std::int64_t bits) {
  return fake_quantize_weights({weight}, {bits}).front();
}

Tensor observe_range(const Tensor& x, const Tensor& state, double momentum) {
  const Input input("x", x);
  parameter("state", state, 3, x);
  Tensor average = empty_1d(state, 2, ScalarType::Float);
  cpu::observe_range(input.data(), static_cast<float*>(state.mutable_data_ptr()),
                     static_cast<float*>(average.mutable_data_ptr()), input.type, x.numel(), momentum, kTorchThreads);
  return average;
}

Tensor batch_norm_act_fake_quantize(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                    const Tensor& lower, const Tensor& upper, std::int64_t bits, double eps,
                                    std::int64_t act, bool /*clipped: the gradient's kind*/) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Ranges range = ranges(lower, upper, bits, 1, x);
  Tensor y = input.empty_like();
  cpu::batch_norm_act_fake_quantize(input.data(), y.mutable_data_ptr(), input.type, input.shape, input.norm,
                                    make_quantizer(*range.lower, *range.upper, range.bits), checked_activation(act),
                                    kTorchThreads);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_fake_quantize_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& lower, const Tensor& upper,
    std::int64_t bits, double eps, std::int64_t act, bool clipped) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Tensor gradient = gradient_like(grad_y, input);
  const Ranges range = ranges(lower, upper, bits, 1, x);
  Tensor grad_x = input.empty_like();
  Tensor grad_weight = empty_1d(running_mean, input.shape.channels, ScalarType::Float);
  Tensor grad_bias = empty_1d(running_mean, input.shape.channels, ScalarType::Float);
  cpu::batch_norm_act_fake_quantize_backward(
      gradient.const_data_ptr(), input.data(), grad_x.mutable_data_ptr(),
      static_cast<float*>(grad_weight.mutable_data_ptr()), static_cast<float*>(grad_bias.mutable_data_ptr()),
      input.type, input.shape, input.norm, make_quantizer(*range.lower, *range.upper, range.bits),
      checked_activation(act), clipped, kTorchThreads);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_moments(const Tensor& x, const Tensor& running_mean,
                                                          const Tensor& running_var,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps,
                                                          std::int64_t act) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  Tensor y = input.empty_like();
  Tensor mean = empty_1d(running_mean, input.shape.channels, ScalarType::Float);
  Tensor variance = empty_1d(running_mean, input.shape.channels, ScalarType::Float);
  cpu::batch_norm_act_moments(input.data(), y.mutable_data_ptr(), static_cast<float*>(mean.mutable_data_ptr()),
                              static_cast<float*>(variance.mutable_data_ptr()), input.type, input.shape, input.norm,
                              checked_activation(act), kTorchThreads);
  return {y, mean, variance};
}

Tensor batch_norm_act_moments_backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                                       const Tensor& x, const Tensor& mean, const Tensor& running_mean,
                                       const Tensor& running_var, const std::optional<Tensor>& weight,
                                       const std::optional<Tensor>& bias, double eps, std::int64_t act) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Tensor gradient = gradient_like(grad_y, input);
  const std::int64_t channels = input.shape.channels;
  Tensor grad_x = input.empty_like();
  cpu::batch_norm_act_moments_backward(gradient.const_data_ptr(), parameter("grad_mean", grad_mean, channels, x),
                                       parameter("grad_var", grad_var, channels, x), input.data(),
                                       parameter("mean", mean, channels, x), grad_x.mutable_data_ptr(), input.type,
                                       input.shape, input.norm, checked_activation(act), kTorchThreads);
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gdfq_ext, CPU, library) {
  library.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  library.impl("fake_quantize_clipped", TORCH_BOX(&fake_quantize_clipped));
  library.impl("fake_quantize_clipped_backward", TORCH_BOX(&fake_quantize_clipped_backward));
  library.impl("fake_quantize_weight", TORCH_BOX(&fake_quantize_weight));
  library.impl("fake_quantize_weights", TORCH_BOX(&fake_quantize_weights));
  library.impl("observe_range", TORCH_BOX(&observe_range));
  library.impl("batch_norm_act_fake_quantize", TORCH_BOX(&batch_norm_act_fake_quantize));
  library.impl("batch_norm_act_fake_quantize_backward", TORCH_BOX(&batch_norm_act_fake_quantize_backward));
  library.impl("batch_norm_act_moments", TORCH_BOX(&batch_norm_act_moments));
  library.impl("batch_norm_act_moments_backward", TORCH_BOX(&batch_norm_act_moments_backward));
}

}  // namespace gdfq::binding
