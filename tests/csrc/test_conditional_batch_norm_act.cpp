// Batch normalization with gamma and beta by label and LeakyReLU, and its gradients, against float64.
#include "kernels/conditional_batch_norm_act.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

constexpr float kEpsilon = 1e-3f;
constexpr float kMomentum = 0.3f;
constexpr float kSlope = 0.2f;
constexpr std::int64_t kClasses = 3;

struct Case {
  Case(std::int64_t given_samples, const ChannelShape& given, float offset = 0.0f)
      : samples(given_samples),
        shape(given),
        x(random_values(given.numel(), 31, offset)),
        grad_y(random_values(given.numel(), 32)),
        weight(random_values(kClasses * given.channels, 33)),
        bias(random_values(kClasses * given.channels, 34)),
        running_mean(random_values(given.channels, 35)),
        running_var(static_cast<std::size_t>(given.channels), 0.7f) {
    for (std::int64_t n = 0; n < samples; ++n) labels.push_back(n * n % kClasses);
  }

  ConditionalBatchNorm norm() const {
    return {weight.data(), bias.data(), labels.data(), samples, kClasses, shape.channels, kSlope};
  }

  double count() const { return static_cast<double>(shape.outer * shape.inner); }
  std::size_t sample_of(std::size_t i) const { return i / (x.size() / static_cast<std::size_t>(samples)); }
  // Where the tables have the gamma and the beta of element i.
  std::size_t place_of(std::size_t i) const {
    return static_cast<std::size_t>(labels[sample_of(i)] * shape.channels) + channel_of(shape, i);
  }

  std::int64_t samples;
  ChannelShape shape;
  std::vector<float> x, grad_y, weight, bias, running_mean, running_var;
  std::vector<std::int64_t> labels;
};

struct Result {
  explicit Result(const Case& c)
      : y(c.x.size(), -1.0f),
        mean(c.running_mean.size(), -1.0f),
        inv_std(mean),
        new_mean(mean),
        new_var(mean),
        grad_x(y),
        grad_weight(c.weight.size(), -1.0f),
        grad_bias(grad_weight) {}

  std::vector<float> y, mean, inv_std, new_mean, new_var, grad_x, grad_weight, grad_bias;
};

Result run(const Case& c, const Parallel& parallel) {
  Result r(c);
  const BatchStatistics statistics{c.running_mean.data(), c.running_var.data(), r.mean.data(),
                                   r.inv_std.data(),      r.new_mean.data(),    r.new_var.data()};
  conditional_batch_norm_act(c.x.data(), r.y.data(), statistics, ElementType::kFloat32, c.shape, c.norm(), kMomentum,
                             kEpsilon, parallel);
  conditional_batch_norm_act_backward(c.grad_y.data(), c.x.data(), r.grad_x.data(), r.grad_weight.data(),
                                      r.grad_bias.data(), r.mean.data(), r.inv_std.data(), ElementType::kFloat32,
                                      c.shape, c.norm(), parallel);
  return r;
}

// The equations in float64, one element after another.
struct Exact {
  explicit Exact(const Case& c)
      : mean(c.running_mean.size()),
        variance(mean),
        normalized(c.x.size()),
        z(c.x.size()),
        grad_z(c.x.size()),
        grad_weight(c.weight.size()),
        grad_bias(c.weight.size()),
        grad_x(c.x.size()) {
    for (std::size_t i = 0; i < c.x.size(); ++i) mean[channel_of(c.shape, i)] += c.x[i] / c.count();
    for (std::size_t i = 0; i < c.x.size(); ++i) {
      const double deviation = c.x[i] - mean[channel_of(c.shape, i)];
      variance[channel_of(c.shape, i)] += deviation * deviation / c.count();
    }
    std::vector<double> scaled(mean.size()), scaled_normalized(mean.size());
    for (std::size_t i = 0; i < c.x.size(); ++i) {
      const std::size_t channel = channel_of(c.shape, i), place = c.place_of(i);
      const double gamma = c.weight[place];
      normalized[i] = (c.x[i] - mean[channel]) / deviation_of(channel);
      z[i] = gamma * normalized[i] + c.bias[place];
      grad_z[i] = z[i] > 0.0 ? c.grad_y[i] : static_cast<double>(c.grad_y[i]) * kSlope;
      grad_weight[place] += grad_z[i] * normalized[i];
      grad_bias[place] += grad_z[i];
      scaled[channel] += gamma * grad_z[i] / c.count();
      scaled_normalized[channel] += gamma * grad_z[i] * normalized[i] / c.count();
    }
    for (std::size_t i = 0; i < c.x.size(); ++i) {
      const std::size_t channel = channel_of(c.shape, i);
      const double centered =
          c.weight[c.place_of(i)] * grad_z[i] - scaled[channel] - normalized[i] * scaled_normalized[channel];
      grad_x[i] = centered / deviation_of(channel);
    }
  }

  double deviation_of(std::size_t channel) const { return std::sqrt(variance[channel] + kEpsilon); }

  std::vector<double> mean, variance, normalized, z, grad_z, grad_weight, grad_bias, grad_x;
};

void test_statistics(const Case& c, const Result& result, const Exact& exact) {
  for (std::size_t k = 0; k < exact.mean.size(); ++k) {
    const double unbiased = exact.variance[k] * c.count() / (c.count() - 1.0);
    CHECK(close(result.mean[k], exact.mean[k], 2e-7));
    CHECK(std::abs(result.inv_std[k] * exact.deviation_of(k) - 1.0) < 1e-6);
    CHECK(close(result.new_mean[k], c.running_mean[k] + kMomentum * (exact.mean[k] - c.running_mean[k]), 2e-7));
    CHECK(close(result.new_var[k], c.running_var[k] + kMomentum * (unbiased - c.running_var[k]), 1e-6));
  }
}

void test_against_float64(const Case& c) {
  const Result result = run(c, kSerial);
  const Exact exact(c);
  test_statistics(c, result, exact);
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    CHECK(close(result.y[i], exact.z[i] < 0.0 ? exact.z[i] * kSlope : exact.z[i], 1e-5));
    if (std::abs(exact.z[i]) > 1e-4) CHECK(close(result.grad_x[i], exact.grad_x[i], 2e-5));
  }
  for (std::size_t k = 0; k < exact.grad_weight.size(); ++k) {
    CHECK(close(result.grad_weight[k], exact.grad_weight[k], 2e-5));
    CHECK(close(result.grad_bias[k], exact.grad_bias[k], 2e-5));
  }
}

void test_threads_do_not_matter(const Case& c) {
  const Result one = run(c, kSerial), two = run(c, kTwoThreads);
  CHECK(same(one.y, two.y) && same(one.mean, two.mean) && same(one.inv_std, two.inv_std));
  CHECK(same(one.grad_x, two.grad_x) && same(one.grad_weight, two.grad_weight) && same(one.grad_bias, two.grad_bias));
}

// The mean is 1,000 deviations from 0 and from the running mean: float32 inputs still determine the variance.
void test_statistics_far_from_zero(std::int64_t samples, const ChannelShape& shape) {
  const Case c(samples, shape, 2000.0f);
  test_statistics(c, run(c, kSerial), Exact(c));
}

void test_label_without_a_row() {
  for (const ChannelShape& shape : {ChannelShape{3, 5, 20}, ChannelShape{60, 5, 1}}) {
    Case c(3, shape);
    c.labels = {0, 1, 2};
    Result with_row = run(c, kSerial);
    for (std::size_t k = 5; k < 10; ++k) with_row.grad_weight[k] = with_row.grad_bias[k] = 0.0f;
    for (const std::int64_t label : {std::int64_t{-1}, kClasses}) {
      c.labels[1] = label;
      const Result result = run(c, kSerial);
      for (std::size_t i = 0; i < c.x.size(); ++i) {
        CHECK(same(result.y[i], c.sample_of(i) == 1 ? kNan : with_row.y[i]));
        CHECK(std::isnan(result.grad_x[i]));  // through the sums over all samples
      }
      CHECK(same(result.grad_weight, with_row.grad_weight) && same(result.grad_bias, with_row.grad_bias));
    }
  }
}

void test_no_elements() {
  const Case c(0, {0, 4, 1});
  const Result result = run(c, kSerial);
  CHECK(same(result.mean, std::vector<float>(4, kNan)) && same(result.inv_std, std::vector<float>(4, kNan)));
  CHECK(same(result.new_mean, c.running_mean) && same(result.new_var, c.running_var));
  CHECK(same(result.grad_weight, std::vector<float>(c.weight.size(), 0.0f)));
  CHECK(same(result.grad_bias, std::vector<float>(c.weight.size(), 0.0f)));
}

}  // namespace

int main() {
  struct Batch {
    std::int64_t samples;
    ChannelShape shape;
  };
  // One sample and few, whose elements the threads share, and many, which they share; long, short and no planes.
  for (const Batch& batch : {Batch{1, {1, 5, 64}}, Batch{3, {3, 2, 20000}}, Batch{40, {40, 6, 49}},
                             Batch{1, {90, 3, 1}}, Batch{5, {4000, 16, 1}}, Batch{20, {20 * 36, 70, 1}},
                             Batch{17, {17, 9, 1}}, Batch{4, {4, 7, 9}}, Batch{6, {6, 1, 50}}, Batch{6, {300, 1, 1}}}) {
    const Case c(batch.samples, batch.shape);
    test_against_float64(c);
    test_threads_do_not_matter(c);
    test_statistics_far_from_zero(batch.samples, batch.shape);
  }
  test_label_without_a_row();
  test_no_elements();
}
