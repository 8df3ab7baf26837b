// A random input with a frozen batch normalization, and the same in float64.
#pragma once

#include "kernels/parameters.h"
#include "testing.h"

namespace gdfq::testing {

constexpr float kEpsilon = 1e-5f;

struct NormCase {
  explicit NormCase(const ChannelShape& given, float offset = 0.0f)
      : shape(given),
        x(random_values(given.numel(), 11, offset)),
        grad_y(random_values(given.numel(), 12)),
        mean(random_values(given.channels, 13, offset, 0.5f)),
        variance(random_values(given.channels, 14)),
        weight(random_values(given.channels, 15)),
        bias(random_values(given.channels, 16)) {
    for (float& value : variance) value = std::abs(value) + 0.2f;
  }

  FrozenBatchNorm norm() const { return {mean.data(), variance.data(), weight.data(), bias.data(), kEpsilon}; }

  NormOracle oracle(std::size_t c) const { return {weight[c], bias[c], mean[c], variance[c], kEpsilon}; }

  ChannelShape shape;
  std::vector<float> x, grad_y, mean, variance, weight, bias;
};

inline double activated(double z, Activation activation) {
  if (activation == Activation::kNone) return z;
  const double positive = z > 0.0 ? z : 0.0;
  return activation == Activation::kRelu6 && positive > 6.0 ? 6.0 : positive;
}

inline bool passes(double z, Activation activation) {
  return activation == Activation::kNone || (z > 0.0 && (activation == Activation::kRelu || z < 6.0));
}

// Within float32's error of a kink, where the gradient may be either.
inline bool near_kink(double z) { return std::abs(z) < 1e-4 || std::abs(z - 6.0) < 1e-4; }

}  // namespace gdfq::testing
