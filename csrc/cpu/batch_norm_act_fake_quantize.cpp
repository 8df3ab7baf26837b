// y = quantize(act(x * scale_c + shift_c)), with the gradients of x and of the BN's weight and bias in one pass.
// Bytes per element (float32): 8 forward, 12 backward (z is computed again, not saved).
#include "../kernels/batch_norm_act_fake_quantize.h"

#include "channel_sums.h"
#include "simd.h"

namespace gdfq::cpu {
namespace {

template <class Parameters>
GDFQ_HD Affine affine_at(const Parameters& parameters, std::int64_t i) {
  return {parameters.get(0, i), parameters.get(1, i)};
}

template <class T, class Parameters, class Quantizer>
GDFQ_CLONES void forward_run(const T* x, T* y, std::int64_t length, Parameters parameters, Quantizer quantizer,
                             Bounds activation) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const float z = apply_affine(to_float(x[i]), affine_at(parameters, i));
    y[i] = from_float<T>(fake_quantize(activate(z, activation), quantizer));
  }
}

// Adds dz * (x - running_mean) and dz, where dz is the gradient of z.
template <bool clipped, class T, class Parameters, class Quantizer>
GDFQ_CLONES void backward_run(const T* grad_y, const T* x, T* grad_x, std::int64_t length, Parameters parameters,
                              Quantizer quantizer, Bounds activation, Accumulators accumulators) {
  const auto strip = [&](std::int64_t begin, std::int64_t count, Accumulators sums) GDFQ_INLINE_LAMBDA {
    GDFQ_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const Affine affine = affine_at(parameters, i);
      const float value = to_float(x[begin + i]);
      const float z = apply_affine(value, affine);
      bool passes = is_active(z, activation);
      if (clipped) passes = passes & is_inside(round_to_level(activate(z, activation), quantizer), quantizer);
      const float gradient = to_float(grad_y[begin + i]);  // read in any case: a conditional read does not vectorize
      const float grad_z = passes ? gradient : 0.0f;
      grad_x[begin + i] = from_float<T>(fp32::multiply(grad_z, affine.scale));
      sums.first[i] += grad_z * (value - parameters.get(2, i));
      sums.second[i] += grad_z;
    }
  };
  for_each_strip(length, parameters, accumulators, strip);
}

}  // namespace

void batch_norm_act_fake_quantize(const void* x, void* y, ElementType type, ChannelShape shape,
                                  const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                  const Parallel& parallel) {
  if (shape.numel() == 0) return;
  const Bounds bounds = bounds_of(activation);
  const ChannelTable<2> table(shape, [&](std::int64_t c) {
    const Affine affine = norm.affine(c);
    return std::array<float, 2>{affine.scale, affine.shift};
  });
  with_quantizer(ranges.scheme, [&](auto scheme) {
    const auto quantizer = ranges.quantizer<decltype(scheme)>();
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_each_run(table, parallel, [&](std::int64_t offset, std::int64_t length, const auto& parameters) {
        forward_run(static_cast<const T*>(x) + offset, static_cast<T*>(y) + offset, length, parameters, quantizer,
                    bounds);
      });
    });
  });
}

void batch_norm_act_fake_quantize_backward(const void* grad_y, const void* x, void* grad_x, float* grad_weight,
                                           float* grad_bias, ElementType type, ChannelShape shape,
                                           const FrozenBatchNorm& norm, const Ranges& ranges, Activation activation,
                                           bool clipped, const Parallel& parallel) {
  if (shape.numel() == 0) {
    std::fill_n(grad_weight, shape.channels, 0.0f);
    std::fill_n(grad_bias, shape.channels, 0.0f);
    return;
  }
  const Bounds bounds = bounds_of(activation);
  const ChannelTable<3> table(shape, [&](std::int64_t c) {
    const Affine affine = norm.affine(c);
    return std::array<float, 3>{affine.scale, affine.shift, norm.running_mean[c]};
  });
  ChannelSums sums(shape.channels);
  with_quantizer(ranges.scheme, [&](auto scheme) {
    const auto quantizer = ranges.quantizer<decltype(scheme)>();
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      with_bool(clipped, [&](auto is_clipped) {
        sums = sum_channels(
            table, parallel,
            [&](std::int64_t offset, std::int64_t length, const auto& parameters, Accumulators accumulators) {
              backward_run<decltype(is_clipped)::value>(
                  static_cast<const T*>(grad_y) + offset, static_cast<const T*>(x) + offset,
                  static_cast<T*>(grad_x) + offset, length, parameters, quantizer, bounds, accumulators);
            });
      });
    });
  });
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    const auto channel = static_cast<std::size_t>(c);
    grad_weight[c] =
        static_cast<float>(sums.first[channel] * static_cast<double>(inverse_std(norm.running_var[c], norm.epsilon)));
    grad_bias[c] = static_cast<float>(sums.second[channel]);
  }
}

}  // namespace gdfq::cpu
