// y = act(x * scale_c + shift_c), and the mean and the biased variance of x in each channel, from one read of x.
// The gradient of both joins the gradient of y in one pass.
// Bytes per element (float32): 8 forward, 12 backward.
#include "../kernels/batch_norm_act_moments.h"

#include <limits>

#include "channel_sums.h"
#include "simd.h"

namespace gdfq::cpu {
namespace {

template <class Parameters>
GDFQ_HD Affine affine_at(const Parameters& parameters, std::int64_t i) {
  return {parameters.get(0, i), parameters.get(1, i)};
}

// Adds d and d^2 with d = x - running_mean: deviations from a point near the mean keep the variance accurate where
// sums of x and x^2 would cancel.
template <class T, class Parameters>
GDFQ_CLONES void forward_run(const T* x, T* y, std::int64_t length, Parameters parameters, Bounds activation,
                             Accumulators accumulators) {
  const auto strip = [&](std::int64_t begin, std::int64_t count, Accumulators sums) GDFQ_INLINE_LAMBDA {
    GDFQ_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = to_float(x[begin + i]);
      const float deviation = value - parameters.get(2, i);
      y[begin + i] = from_float<T>(activate(apply_affine(value, affine_at(parameters, i)), activation));
      sums.first[i] += deviation;
      sums.second[i] += deviation * deviation;
    }
  };
  for_each_strip(length, parameters, accumulators, strip);
}

// Parameters: scale, shift, mean, grad_mean / n, 2 * grad_variance / n.
template <class T, class Parameters>
GDFQ_CLONES void backward_run(const T* grad_y, const T* x, T* grad_x, std::int64_t length, Parameters parameters,
                              Bounds activation) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const Affine affine = affine_at(parameters, i);
    const float value = to_float(x[i]);
    const float gradient = to_float(grad_y[i]);  // read in any case: a conditional read does not vectorize
    const float grad_z = is_active(apply_affine(value, affine), activation) ? gradient : 0.0f;
    const float statistics = parameters.get(3, i) + parameters.get(4, i) * (value - parameters.get(2, i));
    grad_x[i] = from_float<T>(grad_z * affine.scale + statistics);
  }
}

}  // namespace

void batch_norm_act_moments(const void* x, void* y, float* mean, float* variance, ElementType type, ChannelShape shape,
                            const FrozenBatchNorm& norm, Activation activation, const Parallel& parallel) {
  if (shape.numel() == 0) {
    std::fill_n(mean, shape.channels, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(variance, shape.channels, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const ChannelTable<3> table(shape, [&](std::int64_t c) {
    const Affine affine = norm.affine(c);
    return std::array<float, 3>{affine.scale, affine.shift, norm.running_mean[c]};
  });
  ChannelSums sums(shape.channels);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    sums =
        sum_channels(table, parallel,
                     [&](std::int64_t offset, std::int64_t length, const auto& parameters, Accumulators accumulators) {
                       forward_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset, length, parameters,
                                   bounds_of(activation), accumulators);
                     });
  });
  const double count = static_cast<double>(shape.outer * shape.inner);
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const double deviation = sums.first[static_cast<std::size_t>(c)] / count;
    const double square = sums.second[static_cast<std::size_t>(c)] / count - deviation * deviation;
    mean[c] = static_cast<float>(static_cast<double>(norm.running_mean[c]) + deviation);
    variance[c] = static_cast<float>(square < 0.0 ? 0.0 : square);
  }
}

void batch_norm_act_moments_backward(const void* grad_y, const float* grad_mean, const float* grad_variance,
                                     const void* x, const float* mean, void* grad_x, ElementType type,
                                     ChannelShape shape, const FrozenBatchNorm& norm, Activation activation,
                                     const Parallel& parallel) {
  if (shape.numel() == 0) return;
  const float count = static_cast<float>(shape.outer * shape.inner);
  const ChannelTable<5> table(shape, [&](std::int64_t c) {
    const Affine affine = norm.affine(c);
    return std::array<float, 5>{affine.scale, affine.shift, mean[c], grad_mean[c] / count,
                                grad_variance[c] * 2.0f / count};
  });
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_run(table, parallel, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
      backward_run(static_cast<const T*>(grad_y) + offset, static_cast<const T*>(x) + offset,
                   static_cast<T*>(grad_x) + offset, length, parameters, bounds_of(activation));
    });
  });
}

}  // namespace gdfq::cpu
