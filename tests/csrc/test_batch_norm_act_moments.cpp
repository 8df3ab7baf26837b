// Frozen BN and activation with the moments of the input, and the gradient that joins all three, against float64.
#include "kernels/batch_norm_act_moments.h"

#include "norm_case.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

struct Result {
  std::vector<float> y, mean, variance;
};

Result forward(const NormCase& c, Activation activation, const Parallel& parallel) {
  const auto channels = static_cast<std::size_t>(c.shape.channels);
  Result result{std::vector<float>(c.x.size(), -1.0f), std::vector<float>(channels, -1.0f),
                std::vector<float>(channels, -1.0f)};
  batch_norm_act_moments(c.x.data(), result.y.data(), result.mean.data(), result.variance.data(), ElementType::kFloat32,
                         c.shape, c.norm(), activation, parallel);
  return result;
}

double count_of(const NormCase& c) { return static_cast<double>(c.shape.outer * c.shape.inner); }

void test_forward(const NormCase& c, Activation activation, double tolerance) {
  const Result result = forward(c, activation, kSerial);
  const auto channels = static_cast<std::size_t>(c.shape.channels);
  std::vector<double> mean(channels), variance(channels);
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    const std::size_t channel = channel_of(c.shape, i);
    mean[channel] += static_cast<double>(c.x[i]) / count_of(c);
    CHECK(close(result.y[i], activated(c.oracle(channel)(c.x[i]), activation), tolerance));
  }
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    const std::size_t channel = channel_of(c.shape, i);
    const double deviation = static_cast<double>(c.x[i]) - mean[channel];
    variance[channel] += deviation * deviation / count_of(c);
  }
  for (std::size_t k = 0; k < channels; ++k) {
    if (c.x.empty()) {
      CHECK(std::isnan(result.mean[k]) && std::isnan(result.variance[k]));
    } else {
      CHECK(close(result.mean[k], mean[k], 1e-6) && close(result.variance[k], variance[k], 1e-5));
    }
  }
}

void test_backward(const NormCase& c, Activation activation) {
  const Result statistics = forward(c, activation, kSerial);
  const std::vector<float> grad_mean = random_values(c.shape.channels, 21);
  const std::vector<float> grad_variance = random_values(c.shape.channels, 22);
  std::vector<float> grad_x(c.x.size(), -1.0f);
  batch_norm_act_moments_backward(c.grad_y.data(), grad_mean.data(), grad_variance.data(), c.x.data(),
                                  statistics.mean.data(), grad_x.data(), ElementType::kFloat32, c.shape, c.norm(),
                                  activation, kTwoThreads);
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    const std::size_t channel = channel_of(c.shape, i);
    const NormOracle norm = c.oracle(channel);
    const double z = norm(c.x[i]);
    if (near_kink(z)) continue;
    const double deviation = static_cast<double>(c.x[i]) - static_cast<double>(statistics.mean[channel]);
    const double expected = (passes(z, activation) ? static_cast<double>(c.grad_y[i]) * norm.scale : 0.0) +
                            static_cast<double>(grad_mean[channel]) / count_of(c) +
                            2.0 * static_cast<double>(grad_variance[channel]) * deviation / count_of(c);
    CHECK(close(grad_x[i], expected, 1e-5));
  }
}

void test_threads_do_not_matter(const NormCase& c) {
  const Result one = forward(c, Activation::kRelu, kSerial), two = forward(c, Activation::kRelu, kTwoThreads);
  CHECK(same(one.y, two.y) && same(one.mean, two.mean) && same(one.variance, two.variance));
}

void test_nan_stays_in_its_channel() {
  for (const ChannelShape& shape : {ChannelShape{4, 3, 50}, ChannelShape{50, 3, 1}}) {
    NormCase c(shape);
    c.x[0] = kNan;
    const Result result = forward(c, Activation::kRelu, kSerial);
    CHECK(std::isnan(result.y[0]) && std::isnan(result.mean[0]) && std::isnan(result.variance[0]));
    CHECK(std::isfinite(result.mean[1]) && std::isfinite(result.variance[2]));
  }
}

}  // namespace

int main() {
  for (const ChannelShape& shape : shapes()) {
    const NormCase c(shape);
    for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kRelu6}) {
      test_forward(c, activation, 1e-5);
      test_backward(c, activation);
    }
    test_threads_do_not_matter(c);
    test_forward(NormCase(shape, 2000.0f), Activation::kNone, 1e-2);  // a mean of 1000 deviations: sums must not cancel
  }
  test_nan_stays_in_its_channel();
}
