// AdaRound's soft weights with their penalty, and the gradients of both.
// Bytes per element: 12 forward, 16 backward.
#include "../kernels/round_learned.h"

#include "channel_tasks.h"
#include "exponential.h"
#include "lanes.h"

namespace gdfq::cpu {
namespace {

// The exponential of what is not positive cannot overflow.
GDFQ_HD float sigmoid(float v) {
  const float exponential = exp_of_negative(v < 0.0f ? v : -v);
  return (v < 0.0f ? exponential : 1.0f) / (1.0f + exponential);
}

GDFQ_HD float power(float centered, float exponent) {
  return exp_of_negative(exponent * log_of_share(centered < 0.0f ? -centered : centered));
}

// Gives the penalty.
GDFQ_CLONES float forward_run(const float* base, const float* v, float* y, std::int64_t length, float sharpness,
                              StepQuantizer quantizer) {
  return sum_of(length, [=](std::int64_t i) GDFQ_INLINE_LAMBDA {
    const SoftRounding rounding = soft_rounding(sigmoid(v[i]));
    y[i] = dequantize(clamp_level(base[i] + rounding.up, quantizer), quantizer);
    return 1.0f - power(centered(rounding), sharpness);
  });
}

// Gives the gradient of the step.
GDFQ_CLONES float backward_run(const float* grad_y, const float* base, const float* v, float* grad_v,
                               std::int64_t length, float grad_penalty, float sharpness, StepQuantizer quantizer) {
  const float of_penalty = grad_penalty * 2.0f * sharpness;
  return sum_of(length, [=](std::int64_t i) GDFQ_INLINE_LAMBDA {
    const SoftRounding rounding = soft_rounding(sigmoid(v[i]));
    const float of_power = power(centered(rounding), sharpness - 1.0f);
    const SoftGradient gradient = soft_gradient(grad_y[i], of_penalty, base[i], rounding, of_power, quantizer);
    grad_v[i] = gradient.v;
    return gradient.step;
  });
}

// Calls run(channel) for all of the weight.
template <class Run>
void for_each_channel(const SoftWeight& weight, const Parallel& parallel, const Run& run) {
  const std::int64_t together = std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, weight.length));
  parallel_for(parallel, (weight.channels + together - 1) / together, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first * together; c < std::min(last * together, weight.channels); ++c) run(c);
  });
}

}  // namespace

void round_learned(const SoftWeight& weight, float* y, float* penalty, const Parallel& parallel) {
  std::vector<float> penalties(static_cast<std::size_t>(weight.channels));
  for_each_channel(weight, parallel, [&](std::int64_t c) {
    const std::int64_t offset = c * weight.length;
    penalties[static_cast<std::size_t>(c)] = forward_run(weight.base + offset, weight.v + offset, y + offset,
                                                         weight.length, *weight.sharpness, weight.learned.quantizer(c));
  });
  double sum = 0.0;
  for (const float of_channel : penalties) sum += of_channel;
  *penalty = static_cast<float>(sum);
}

void round_learned_backward(const float* grad_y, const float* grad_penalty, const SoftWeight& weight, float* grad_v,
                            float* grad_step, const Parallel& parallel) {
  for_each_channel(weight, parallel, [&](std::int64_t c) {
    const std::int64_t offset = c * weight.length;
    grad_step[c] = backward_run(grad_y + offset, weight.base + offset, weight.v + offset, grad_v + offset,
                                weight.length, *grad_penalty, *weight.sharpness, weight.learned.quantizer(c));
  });
}

}  // namespace gdfq::cpu
