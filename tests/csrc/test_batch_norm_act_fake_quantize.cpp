// Frozen BN, activation and quantizer in one pass, and the gradients of x, weight and bias, against float64.
#include "kernels/batch_norm_act_fake_quantize.h"

#include "norm_case.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

constexpr float kLower = -0.5f, kUpper = 4.0f;
constexpr int kBits = 4;

Ranges ranges(Scheme scheme) { return {&kLower, &kUpper, kBits, scheme}; }

void test_forward(const NormCase& c, Activation activation, Scheme scheme) {
  std::vector<float> y(c.x.size(), -1.0f);
  batch_norm_act_fake_quantize(c.x.data(), y.data(), ElementType::kFloat32, c.shape, c.norm(), ranges(scheme),
                               activation, kSerial);
  const Oracle oracle(kLower, kUpper, kBits, scheme);
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double a = activated(c.oracle(channel_of(c.shape, i))(c.x[i]), activation);
    if (oracle.distance_from_tie(a) > 1e-3) CHECK(close(y[i], oracle.quantize(a), 1e-6));
  }
}

struct Gradients {
  std::vector<float> x, weight, bias;
};

Gradients backward(const NormCase& c, Activation activation, bool clipped, Scheme scheme, const Parallel& parallel) {
  const auto channels = static_cast<std::size_t>(c.shape.channels);
  Gradients gradients{std::vector<float>(c.x.size(), -1.0f), std::vector<float>(channels, -1.0f),
                      std::vector<float>(channels, -1.0f)};
  batch_norm_act_fake_quantize_backward(c.grad_y.data(), c.x.data(), gradients.x.data(), gradients.weight.data(),
                                        gradients.bias.data(), ElementType::kFloat32, c.shape, c.norm(), ranges(scheme),
                                        activation, clipped, parallel);
  return gradients;
}

void test_backward(const NormCase& c, Activation activation, bool clipped, Scheme scheme) {
  const Gradients gradients = backward(c, activation, clipped, scheme, kSerial);
  const Oracle oracle(kLower, kUpper, kBits, scheme);
  const auto channels = static_cast<std::size_t>(c.shape.channels);
  std::vector<double> weight(channels), bias(channels), slack(channels);
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    const std::size_t channel = channel_of(c.shape, i);
    const NormOracle norm = c.oracle(channel);
    const double z = norm(c.x[i]), a = activated(z, activation);
    const bool pass = passes(z, activation) && (!clipped || oracle.inside(a));
    const double grad_z = pass ? static_cast<double>(c.grad_y[i]) : 0.0;
    const double normalized = (static_cast<double>(c.x[i]) - static_cast<double>(c.mean[channel])) * norm.inverse_std;
    weight[channel] += grad_z * normalized;
    bias[channel] += grad_z;
    if (near_kink(z) || (clipped && oracle.distance_from_tie(a) < 1e-3)) {
      slack[channel] += std::abs(static_cast<double>(c.grad_y[i])) * (1.0 + std::abs(normalized));
    } else {
      CHECK(close(gradients.x[i], grad_z * norm.scale, 1e-6));
    }
  }
  for (std::size_t k = 0; k < channels; ++k) {
    CHECK(std::abs(gradients.weight[k] - weight[k]) <= 1e-3 * (1.0 + std::abs(weight[k])) + slack[k]);
    CHECK(std::abs(gradients.bias[k] - bias[k]) <= 1e-3 * (1.0 + std::abs(bias[k])) + slack[k]);
  }
}

void test_threads_do_not_matter(const NormCase& c, Scheme scheme) {
  const Gradients one = backward(c, Activation::kRelu, true, scheme, kSerial);
  const Gradients two = backward(c, Activation::kRelu, true, scheme, kTwoThreads);
  CHECK(same(one.x, two.x) && same(one.weight, two.weight) && same(one.bias, two.bias));
}

// Without a weight and a bias the BN only normalizes.
void test_without_affine(Scheme scheme) {
  NormCase c({2, 3, 40});
  std::fill(c.weight.begin(), c.weight.end(), 1.0f);
  std::fill(c.bias.begin(), c.bias.end(), 0.0f);
  FrozenBatchNorm plain = c.norm();
  plain.weight = nullptr;
  plain.bias = nullptr;
  std::vector<float> given(c.x.size()), absent(c.x.size());
  batch_norm_act_fake_quantize(c.x.data(), given.data(), ElementType::kFloat32, c.shape, c.norm(), ranges(scheme),
                               Activation::kRelu, kSerial);
  batch_norm_act_fake_quantize(c.x.data(), absent.data(), ElementType::kFloat32, c.shape, plain, ranges(scheme),
                               Activation::kRelu, kSerial);
  CHECK(same(given, absent));
}

}  // namespace

int main() {
  for (const ChannelShape& shape : shapes()) {
    const NormCase c(shape);
    for (const Scheme scheme : kSchemes) {
      for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kRelu6}) {
        test_forward(c, activation, scheme);
        for (const bool clipped : {false, true}) test_backward(c, activation, clipped, scheme);
      }
      test_threads_do_not_matter(c, scheme);
    }
  }
  test_without_affine(Scheme::kEq6);
}
