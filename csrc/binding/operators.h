// The operators' bodies, for every device: arguments checked, outputs allocated, the kernel called. Schemas, fake
// kernels and autograd are Python's.
//
// Where says which kernels run: `Where where(x)` is made once the arguments are checked and `where.device()` is the
// last argument of every kernel. Its namespace, gdfq::cpu or gdfq::cuda, is where the call finds the kernel of that
// name.
#pragma once

#include <tuple>
#include <vector>

#include "../kernels/batch_norm_act_fake_quantize.h"
#include "../kernels/batch_norm_act_moments.h"
#include "../kernels/bns_loss.h"
#include "../kernels/conditional_batch_norm_act.h"
#include "../kernels/count_changed_codes.h"
#include "../kernels/distillation_loss.h"
#include "../kernels/fake_quantize.h"
#include "../kernels/fake_quantize_learned.h"
#include "../kernels/fake_quantize_weight.h"
#include "../kernels/observe_range.h"
#include "../kernels/round_learned.h"
#include "tensors.h"

namespace gdfq::binding {

// An input that every kernel reads: dense, with its layout and element type.
struct Input {
  Input(const char* name, const Tensor& given)
      : type(element_type(name, given)), format(dense_format(given)), tensor(in_format(given, format)) {}

  const void* data() const { return tensor.const_data_ptr(); }
  Tensor empty_like() const { return empty_in_format(tensor, format); }

  ElementType type;
  MemoryFormat format;
  Tensor tensor;
};

// A gradient is read along with x, so it takes the type and the layout of x.
inline Tensor gradient_like(const Tensor& gradient, const Input& x) {
  STD_TORCH_CHECK(gradient.numel() == x.tensor.numel(), "grad_y has ", gradient.numel(), " elements and x has ",
                  x.tensor.numel(), "; they must have the same shape");
  check_device("grad_y", gradient, x.tensor);
  if (gradient.scalar_type() == x.tensor.scalar_type()) return in_format(gradient, x.format);
  return in_format(torch::stable::to(gradient, x.tensor.scalar_type()), x.format);
}

// x of shape (N, C, ...), with its channels.
struct ChannelInput : Input {
  explicit ChannelInput(const Tensor& x) : Input("x", x), shape(channels_of(tensor)) {}

  static ChannelShape channels_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 2, "x has ", x.dim(), " dimensions; batch normalization needs (N, C, ...)");
    return channel_shape(x, 1);
  }

  Tensor empty_per_channel() const { return empty_floats(tensor, shape.channels); }

  ChannelShape shape;
};

// The same with the frozen batch normalization of the channels.
struct NormalizedInput : ChannelInput {
  NormalizedInput(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : ChannelInput(x) {
    norm.running_mean = parameter("running_mean", running_mean, shape.channels, x);
    norm.running_var = parameter("running_var", running_var, shape.channels, x);
    norm.weight = parameter("weight", weight, shape.channels, x);
    norm.bias = parameter("bias", bias, shape.channels, x);
    norm.epsilon = static_cast<float>(eps);
  }

  FrozenBatchNorm norm;
};

inline Ranges checked_ranges(const Tensor& lower, const Tensor& upper, std::int64_t bits, std::int64_t scheme,
                             std::int64_t count, const Tensor& x) {
  return {parameter("lower", lower, count, x), parameter("upper", upper, count, x), checked_bits(bits),
          checked_scheme(scheme)};
}

inline ChannelShape channels_along(const Tensor& x, std::int64_t axis) {
  STD_TORCH_CHECK(axis >= -1 && axis < x.dim(), "axis is ", axis, "; it must be -1 or a dimension of x, which has ",
                  x.dim());
  return channel_shape(x, axis);
}

template <class Where>
Tensor fake_quantize(const Tensor& x, const Tensor& lower, const Tensor& upper, std::int64_t bits, std::int64_t scheme,
                     std::int64_t axis) {
  const Input input("x", x);
  const ChannelShape shape = channels_along(input.tensor, axis);
  const Ranges ranges = checked_ranges(lower, upper, bits, scheme, shape.channels, x);
  Tensor y = input.empty_like();
  Where where(x);
  fake_quantize(input.data(), y.mutable_data_ptr(), input.type, shape, ranges, where.device());
  return y;
}

template <class Where>
std::tuple<Tensor, Tensor> fake_quantize_clipped(const Tensor& x, const Tensor& lower, const Tensor& upper,
                                                 std::int64_t bits, std::int64_t scheme, std::int64_t axis) {
  const Input input("x", x);
  const ChannelShape shape = channels_along(input.tensor, axis);
  const Ranges ranges = checked_ranges(lower, upper, bits, scheme, shape.channels, x);
  Tensor y = input.empty_like();
  Tensor mask = torch::stable::new_empty(x, {(x.numel() + 7) / 8}, ScalarType::Byte);
  Where where(x);
  fake_quantize_clipped(input.data(), y.mutable_data_ptr(), static_cast<std::uint8_t*>(mask.mutable_data_ptr()),
                        input.type, shape, ranges, where.device());
  return {y, mask};
}

template <class Where>
Tensor fake_quantize_clipped_backward(const Tensor& grad_y, const Tensor& mask) {
  const Input input("grad_y", grad_y);
  const std::int64_t bytes = (grad_y.numel() + 7) / 8;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == bytes,
                  "mask must be ", bytes, " contiguous uint8, as fake_quantize_clipped returned it");
  check_device("mask", mask, grad_y);
  Tensor grad_x = input.empty_like();
  Where where(grad_y);
  fake_quantize_clipped_backward(input.data(), static_cast<const std::uint8_t*>(mask.const_data_ptr()),
                                 grad_x.mutable_data_ptr(), input.type, grad_y.numel(), where.device());
  return grad_x;
}

template <class Where>
std::vector<Tensor> fake_quantize_weights(const std::vector<Tensor>& weights, const std::vector<std::int64_t>& bits,
                                          const std::vector<std::int64_t>& schemes) {
  STD_TORCH_CHECK(weights.size() == bits.size() && weights.size() == schemes.size(), "there are ", weights.size(),
                  " weights, ", bits.size(), " bits and ", schemes.size(), " schemes; give one of each");
  std::vector<Input> inputs;  // keep copies made dense alive
  std::vector<Tensor> quantized;
  std::vector<Weight> tasks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].dim() >= 1, "a weight has no dimensions; it needs its output channels first");
    check_device("weights", weights[i], weights.front());
    const Input& input = inputs.emplace_back("weight", weights[i]);
    quantized.push_back(input.empty_like());
    const std::int64_t channels = input.tensor.size(0);
    const std::int64_t length = channels == 0 ? 0 : input.tensor.numel() / channels;
    tasks.push_back({input.data(), quantized.back().mutable_data_ptr(), input.type, channels, length,
                     checked_bits(bits[i]), checked_scheme(schemes[i])});
  }
  if (weights.empty()) return quantized;
  Where where(weights.front());
  fake_quantize_weights(tasks, where.device());
  return quantized;
}

template <class Where>
Tensor count_changed_codes(const std::vector<Tensor>& weights, const std::vector<Tensor>& directions,
                           const std::vector<std::int64_t>& bits, const std::vector<std::int64_t>& schemes,
                           const Tensor& learning_rate, const Tensor& kappas) {
  STD_TORCH_CHECK(
      weights.size() == directions.size() && weights.size() == bits.size() && weights.size() == schemes.size(),
      "there are ", weights.size(), " weights, ", directions.size(), " directions, ", bits.size(), " bits and ",
      schemes.size(), " schemes; give one of each");
  const std::int64_t count = kappas.numel();
  STD_TORCH_CHECK(count >= 1 && count <= kMostKappas, "there are ", count, " kappas; 1 to ", kMostKappas,
                  " are allowed");
  std::vector<Tensor> dense;  // keeps copies alive
  const auto floats_of = [&](const char* name, const Tensor& tensor, const Tensor& weight) {
    dense.push_back(in_format(tensor, dense_format(weight)));
    check_device(name, tensor, kappas);
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == weight.numel(), name,
                    " must be float32, a direction as large as its weight");
    return static_cast<const float*>(dense.back().const_data_ptr());
  };
  std::vector<WeightStep> steps;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].dim() >= 1, "a weight has no dimensions; it needs its output channels first");
    const std::int64_t channels = weights[i].size(0);
    steps.push_back({floats_of("weights", weights[i], weights[i]), floats_of("directions", directions[i], weights[i]),
                     channels, channels == 0 ? 0 : weights[i].numel() / channels, checked_bits(bits[i]),
                     checked_scheme(schemes[i])});
  }
  Tensor counts =
      torch::stable::new_empty(kappas, {static_cast<std::int64_t>(weights.size()), count}, ScalarType::Long);
  Where where(kappas);
  count_changed_codes(steps, parameter("learning_rate", learning_rate, 1, kappas),
                      parameter("kappas", kappas, count, kappas), static_cast<int>(count),
                      static_cast<std::int64_t*>(counts.mutable_data_ptr()), where.device());
  return counts;
}

inline LearnedSteps checked_steps(const Tensor& step, const Tensor& zero_point, std::int64_t lowest,
                                  std::int64_t highest, std::int64_t count, const Tensor& x) {
  return {parameter("step", step, count, x), parameter("zero_point", zero_point, count, x), static_cast<float>(lowest),
          static_cast<float>(highest)};
}

// x with a learned quantizer and the choice of what stays as it is.
struct LearnedInput : Input {
  LearnedInput(const Tensor& x, const Tensor& step, const Tensor& zero_point, const std::optional<Tensor>& given,
               std::int64_t lowest, std::int64_t highest, std::int64_t threshold)
      : Input("x", x), learned(checked_steps(step, zero_point, lowest, highest, 1, x)), dense_choice(given) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Byte && given->numel() == x.numel(),
                    "choice must be uint8, one for each element of x");
    check_device("choice", *given, x);
    dense_choice = in_format(*given, format);
    choice = {static_cast<const std::uint8_t*>(dense_choice->const_data_ptr()), static_cast<int>(threshold)};
  }

  LearnedSteps learned;
  std::optional<Tensor> dense_choice;  // keeps a copy alive
  Choice choice{};
};

template <class Where>
Tensor fake_quantize_learned(const Tensor& x, const Tensor& step, const Tensor& zero_point,
                             const std::optional<Tensor>& choice, std::int64_t lowest, std::int64_t highest,
                             std::int64_t threshold, double /*step_gradient_scale*/) {
  const LearnedInput input(x, step, zero_point, choice, lowest, highest, threshold);
  Tensor y = input.empty_like();
  Where where(x);
  fake_quantize_learned(input.data(), y.mutable_data_ptr(), input.type, x.numel(), input.learned, input.choice,
                        where.device());
  return y;
}

template <class Where>
std::tuple<Tensor, Tensor> fake_quantize_learned_backward(const Tensor& grad_y, const Tensor& x, const Tensor& step,
                                                          const Tensor& zero_point, const std::optional<Tensor>& choice,
                                                          std::int64_t lowest, std::int64_t highest,
                                                          std::int64_t threshold, double step_gradient_scale) {
  const LearnedInput input(x, step, zero_point, choice, lowest, highest, threshold);
  const Tensor gradient = gradient_like(grad_y, input);
  Tensor grad_x = input.empty_like();
  Tensor grad_step = empty_floats(step, 1);
  Where where(x);
  fake_quantize_learned_backward(gradient.const_data_ptr(), input.data(), grad_x.mutable_data_ptr(), floats(grad_step),
                                 input.type, x.numel(), input.learned, input.choice, step_gradient_scale,
                                 where.device());
  return {grad_x, grad_step};
}

// What AdaRound makes a weight of, in the layout of base.
struct SoftInput : Input {
  SoftInput(const Tensor& base, const Tensor& v, const Tensor& step, const Tensor& zero_point, const Tensor& sharpness,
            std::int64_t lowest, std::int64_t highest)
      : Input("base", base), v(in_format(v, format)) {
    STD_TORCH_CHECK(base.dim() >= 1, "base has no dimensions; it needs its output channels first");
    STD_TORCH_CHECK(type == ElementType::kFloat32 && v.scalar_type() == ScalarType::Float && v.numel() == base.numel(),
                    "base and v must be float32 and of the same shape");
    check_device("v", v, base);
    const std::int64_t channels = base.size(0);
    weight = {static_cast<const float*>(data()),
              static_cast<const float*>(this->v.const_data_ptr()),
              channels,
              channels == 0 ? 0 : base.numel() / channels,
              checked_steps(step, zero_point, lowest, highest, channels, base),
              parameter("sharpness", sharpness, 1, base)};
  }

  Tensor v;
  SoftWeight weight;
};

template <class Where>
std::tuple<Tensor, Tensor> round_learned(const Tensor& base, const Tensor& v, const Tensor& step,
                                         const Tensor& zero_point, const Tensor& sharpness, std::int64_t lowest,
                                         std::int64_t highest) {
  const SoftInput input(base, v, step, zero_point, sharpness, lowest, highest);
  Tensor y = input.empty_like();
  Tensor penalty = empty_scalar(base);
  Where where(base);
  round_learned(input.weight, floats(y), floats(penalty), where.device());
  return {y, penalty};
}

template <class Where>
std::tuple<Tensor, Tensor> round_learned_backward(const Tensor& grad_y, const Tensor& grad_penalty, const Tensor& base,
                                                  const Tensor& v, const Tensor& step, const Tensor& zero_point,
                                                  const Tensor& sharpness, std::int64_t lowest, std::int64_t highest) {
  const SoftInput input(base, v, step, zero_point, sharpness, lowest, highest);
  const Tensor gradient = gradient_like(grad_y, input);
  Tensor grad_v = input.empty_like();
  Tensor grad_step = empty_floats(step, input.weight.channels);
  Where where(base);
  round_learned_backward(static_cast<const float*>(gradient.const_data_ptr()),
                         parameter("grad_penalty", grad_penalty, 1, base), input.weight, floats(grad_v),
                         floats(grad_step), where.device());
  return {grad_v, grad_step};
}

template <class Where>
Tensor observe_range(const Tensor& x, const Tensor& state, double momentum) {
  const Input input("x", x);
  parameter("state", state, 3, x);
  Tensor average = empty_floats(state, 2);
  Where where(x);
  observe_range(input.data(), floats(state), floats(average), input.type, x.numel(), momentum, where.device());
  return average;
}

template <class Where>
Tensor batch_norm_act_fake_quantize(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                    const Tensor& lower, const Tensor& upper, std::int64_t bits, std::int64_t scheme,
                                    double eps, std::int64_t act, bool /*clipped: the gradient's kind*/) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Ranges ranges = checked_ranges(lower, upper, bits, scheme, 1, x);
  const Activation activation = checked_activation(act);
  Tensor y = input.empty_like();
  Where where(x);
  batch_norm_act_fake_quantize(input.data(), y.mutable_data_ptr(), input.type, input.shape, input.norm, ranges,
                               activation, where.device());
  return y;
}

template <class Where>
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_fake_quantize_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& lower, const Tensor& upper,
    std::int64_t bits, std::int64_t scheme, double eps, std::int64_t act, bool clipped) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Tensor gradient = gradient_like(grad_y, input);
  const Ranges ranges = checked_ranges(lower, upper, bits, scheme, 1, x);
  const Activation activation = checked_activation(act);
  Tensor grad_x = input.empty_like();
  Tensor grad_weight = input.empty_per_channel();
  Tensor grad_bias = input.empty_per_channel();
  Where where(x);
  batch_norm_act_fake_quantize_backward(gradient.const_data_ptr(), input.data(), grad_x.mutable_data_ptr(),
                                        floats(grad_weight), floats(grad_bias), input.type, input.shape, input.norm,
                                        ranges, activation, clipped, where.device());
  return {grad_x, grad_weight, grad_bias};
}

template <class Where>
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_moments(const Tensor& x, const Tensor& running_mean,
                                                          const Tensor& running_var,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double eps,
                                                          std::int64_t act) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Activation activation = checked_activation(act);
  Tensor y = input.empty_like();
  Tensor mean = input.empty_per_channel();
  Tensor variance = input.empty_per_channel();
  Where where(x);
  batch_norm_act_moments(input.data(), y.mutable_data_ptr(), floats(mean), floats(variance), input.type, input.shape,
                         input.norm, activation, where.device());
  return {y, mean, variance};
}

template <class Where>
Tensor batch_norm_act_moments_backward(const Tensor& grad_y, const Tensor& grad_mean, const Tensor& grad_var,
                                       const Tensor& x, const Tensor& mean, const Tensor& running_mean,
                                       const Tensor& running_var, const std::optional<Tensor>& weight,
                                       const std::optional<Tensor>& bias, double eps, std::int64_t act) {
  const NormalizedInput input(x, running_mean, running_var, weight, bias, eps);
  const Tensor gradient = gradient_like(grad_y, input);
  const std::int64_t channels = input.shape.channels;
  const float* mean_gradient = parameter("grad_mean", grad_mean, channels, x);
  const float* variance_gradient = parameter("grad_var", grad_var, channels, x);
  const float* batch_mean = parameter("mean", mean, channels, x);
  const Activation activation = checked_activation(act);
  Tensor grad_x = input.empty_like();
  Where where(x);
  batch_norm_act_moments_backward(gradient.const_data_ptr(), mean_gradient, variance_gradient, input.data(), batch_mean,
                                  grad_x.mutable_data_ptr(), input.type, input.shape, input.norm, activation,
                                  where.device());
  return grad_x;
}

template <class Where>
std::tuple<Tensor, Tensor> bns_loss(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                                    const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                                    bool mean) {
  const std::size_t count = means.size();
  STD_TORCH_CHECK(
      count > 0 && variances.size() == count && running_means.size() == count && running_vars.size() == count,
      "means, variances, running_means and running_vars must have one tensor for each layer, at least one");
  std::vector<LayerStatistics> layers;
  std::int64_t channels = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t length = means[i].numel();
    layers.push_back({parameter("means", means[i], length, means.front()),
                      parameter("variances", variances[i], length, means.front()),
                      parameter("running_means", running_means[i], length, means.front()),
                      parameter("running_vars", running_vars[i], length, means.front()), length});
    channels += length;
  }
  Tensor loss = empty_scalar(means.front());
  Tensor gradient = empty_floats(means.front(), 2 * channels);
  Where where(means.front());
  bns_loss(layers, mean, floats(loss), floats(gradient), where.device());
  return {loss, gradient};
}

template <class Where>
std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(const Tensor& student_logits, const Tensor& teacher_logits,
                                                             const Tensor& targets,
                                                             const std::optional<Tensor>& sample_weight,
                                                             double temperature, double cross_entropy_weight,
                                                             double distillation_weight, bool batchmean) {
  STD_TORCH_CHECK(student_logits.dim() == 2, "student_logits has ", student_logits.dim(), " dimensions instead of 2");
  const std::int64_t batch = student_logits.size(0);
  const std::int64_t classes = student_logits.size(1);
  const float* student = parameter("student_logits", student_logits, batch * classes, student_logits);
  const float* teacher = parameter("teacher_logits", teacher_logits, batch * classes, student_logits);
  Targets goal{};
  if (targets.scalar_type() == ScalarType::Long) {
    goal.labels = checked_labels(targets, batch, student_logits);
  } else {
    goal.shares = parameter("targets", targets, batch * classes, student_logits);
  }
  goal.sample_weight = parameter("sample_weight", sample_weight, batch, student_logits);
  const DistillationWeights weights{static_cast<float>(temperature), static_cast<float>(cross_entropy_weight),
                                    static_cast<float>(distillation_weight), batchmean};
  Tensor loss = empty_scalar(student_logits);
  Tensor cross_entropy = empty_scalar(student_logits);
  Tensor kl = empty_scalar(student_logits);
  Tensor gradient = empty_in_format(student_logits, MemoryFormat::Contiguous);
  Where where(student_logits);
  distillation_loss(student, teacher, goal, batch, classes, weights, floats(loss), floats(cross_entropy), floats(kl),
                    floats(gradient), where.device());
  return {loss, cross_entropy, kl, gradient};
}

// x of shape (N, C, ...), with the tables of its batch normalization.
struct ConditionalInput : ChannelInput {
  ConditionalInput(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& labels, double slope)
      : ChannelInput(x) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; it must be (classes, channels)");
    // Other operations take a single channel for one run; here samples are told apart.
    const std::int64_t channels = tensor.size(1);
    std::int64_t inner = 1;
    for (std::int64_t dim = 2; format == MemoryFormat::Contiguous && dim < tensor.dim(); ++dim)
      inner *= tensor.size(dim);
    shape = {tensor.numel() == 0 ? 0 : tensor.numel() / (channels * inner), channels, inner};
    norm.samples = tensor.size(0);
    norm.classes = weight.size(0);
    norm.channels = channels;
    norm.weight = parameter("weight", weight, norm.classes * channels, x);
    norm.bias = parameter("bias", bias, norm.classes * channels, x);
    norm.labels = checked_labels(labels, norm.samples, x);
    norm.slope = static_cast<float>(slope);
  }

  ConditionalBatchNorm norm;
};

template <class Where>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conditional_batch_norm_act(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& labels, const Tensor& running_mean,
    const Tensor& running_var, double momentum, double eps, double slope) {
  const ConditionalInput input(x, weight, bias, labels, slope);
  const std::int64_t channels = input.shape.channels;
  Tensor y = input.empty_like();
  Tensor mean = input.empty_per_channel();
  Tensor inv_std = input.empty_per_channel();
  Tensor new_mean = input.empty_per_channel();
  Tensor new_var = input.empty_per_channel();
  const BatchStatistics statistics{parameter("running_mean", running_mean, channels, x),
                                   parameter("running_var", running_var, channels, x),
                                   floats(mean),
                                   floats(inv_std),
                                   floats(new_mean),
                                   floats(new_var)};
  Where where(x);
  conditional_batch_norm_act(input.data(), y.mutable_data_ptr(), statistics, input.type, input.shape, input.norm,
                             static_cast<float>(momentum), static_cast<float>(eps), where.device());
  return {y, mean, inv_std, new_mean, new_var};
}

template <class Where>
std::tuple<Tensor, Tensor, Tensor> conditional_batch_norm_act_backward(const Tensor& grad_y, const Tensor& x,
                                                                       const Tensor& weight, const Tensor& bias,
                                                                       const Tensor& labels, const Tensor& mean,
                                                                       const Tensor& inv_std, double slope) {
  const ConditionalInput input(x, weight, bias, labels, slope);
  const Tensor gradient = gradient_like(grad_y, input);
  const std::int64_t channels = input.shape.channels;
  const float* batch_mean = parameter("mean", mean, channels, x);
  const float* batch_inv_std = parameter("inv_std", inv_std, channels, x);
  Tensor grad_x = input.empty_like();
  Tensor grad_weight = empty_in_format(weight, MemoryFormat::Contiguous);
  Tensor grad_bias = empty_in_format(weight, MemoryFormat::Contiguous);
  Where where(x);
  conditional_batch_norm_act_backward(gradient.const_data_ptr(), input.data(), grad_x.mutable_data_ptr(),
                                      floats(grad_weight), floats(grad_bias), batch_mean, batch_inv_std, input.type,
                                      input.shape, input.norm, where.device());
  return {grad_x, grad_weight, grad_bias};
}

// Registers the operators of a device.
template <class Where>
void register_operators(torch::stable::detail::StableLibrary& library) {
  library.impl("fake_quantize", TORCH_BOX(&fake_quantize<Where>));
  library.impl("fake_quantize_clipped", TORCH_BOX(&fake_quantize_clipped<Where>));
  library.impl("fake_quantize_clipped_backward", TORCH_BOX(&fake_quantize_clipped_backward<Where>));
  library.impl("fake_quantize_weights", TORCH_BOX(&fake_quantize_weights<Where>));
  library.impl("count_changed_codes", TORCH_BOX(&count_changed_codes<Where>));
  library.impl("fake_quantize_learned", TORCH_BOX(&fake_quantize_learned<Where>));
  library.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward<Where>));
  library.impl("round_learned", TORCH_BOX(&round_learned<Where>));
  library.impl("round_learned_backward", TORCH_BOX(&round_learned_backward<Where>));
  library.impl("observe_range", TORCH_BOX(&observe_range<Where>));
  library.impl("batch_norm_act_fake_quantize", TORCH_BOX(&batch_norm_act_fake_quantize<Where>));
  library.impl("batch_norm_act_fake_quantize_backward", TORCH_BOX(&batch_norm_act_fake_quantize_backward<Where>));
  library.impl("batch_norm_act_moments", TORCH_BOX(&batch_norm_act_moments<Where>));
  library.impl("batch_norm_act_moments_backward", TORCH_BOX(&batch_norm_act_moments_backward<Where>));
  library.impl("conditional_batch_norm_act", TORCH_BOX(&conditional_batch_norm_act<Where>));
  library.impl("conditional_batch_norm_act_backward", TORCH_BOX(&conditional_batch_norm_act_backward<Where>));
  library.impl("bns_loss", TORCH_BOX(&bns_loss<Where>));
  library.impl("distillation_loss", TORCH_BOX(&distillation_loss<Where>));
}

}  // namespace gdfq::binding
