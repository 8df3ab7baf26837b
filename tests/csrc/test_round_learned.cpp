// AdaRound's soft weights against their expression in float64: values, penalty, gradients, threads; the logarithm.
#include "kernels/round_learned.h"

#include "cpu/exponential.h"
#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

struct Case {
  Case(std::int64_t channels, std::int64_t length, float b)
      : base(random_values(channels * length, 1, 0.0f, 4.0f)),
        v(random_values(channels * length, 2)),
        grad_y(random_values(channels * length, 3)),
        step(random_values(channels, 4)),
        zero_point(static_cast<std::size_t>(channels)),
        sharpness(b),
        weight{base.data(), v.data(), channels, length, {step.data(), zero_point.data(), 0.0f, 7.0f}, &sharpness} {
    for (float& value : base) value = std::floor(value);
    for (float& value : step) value = std::abs(value) + 0.1f;
    for (std::size_t c = 0; c < zero_point.size(); ++c) zero_point[c] = static_cast<float>(c % 8);
  }

  std::vector<float> base, v, grad_y, step, zero_point;
  float sharpness;
  SoftWeight weight;
};

struct Results {
  std::vector<float> y, grad_v, grad_step;
  float penalty = -1.0f;
};

constexpr float kGradPenalty = -0.3f;

Results run(const Case& c, const Parallel& parallel) {
  Results results;
  results.y.assign(c.base.size(), -1.0f);
  results.grad_v.assign(c.base.size(), -1.0f);
  results.grad_step.assign(c.step.size(), -1.0f);
  round_learned(c.weight, results.y.data(), &results.penalty, parallel);
  round_learned_backward(c.grad_y.data(), &kGradPenalty, c.weight, results.grad_v.data(), results.grad_step.data(),
                         parallel);
  return results;
}

void test_against_oracle(const Case& c) {
  const Results results = run(c, kSerial);
  const auto length = static_cast<std::size_t>(c.weight.length);
  const auto b = static_cast<double>(c.sharpness);
  double penalty = 0.0;
  for (std::size_t channel = 0; channel < c.step.size(); ++channel) {
    const auto step = static_cast<double>(c.step[channel]);
    const double low = -static_cast<double>(c.zero_point[channel]), high = 7.0 + low;
    double grad_step = 0.0;
    for (std::size_t i = channel * length; i < (channel + 1) * length; ++i) {
      const auto grad_y = static_cast<double>(c.grad_y[i]);
      const double sigmoid = 1.0 / (1.0 + std::exp(-static_cast<double>(c.v[i])));
      const double stretched = 1.2 * sigmoid - 0.1, up = std::fmin(std::fmax(stretched, 0.0), 1.0);
      const double level = static_cast<double>(c.base[i]) + up, clamped = std::fmin(std::fmax(level, low), high);
      const double side = 2.0 * up - 1.0;
      CHECK(close(results.y[i], clamped * step, 1e-6));
      penalty += 1.0 - std::pow(std::abs(side), b);
      grad_step += grad_y * clamped;
      double grad_up = level == clamped ? grad_y * step : 0.0;
      grad_up -=
          static_cast<double>(kGradPenalty) * 2.0 * b * std::pow(std::abs(side), b - 1.0) * (side > 0.0 ? 1.0 : -1.0);
      const bool moves = stretched > 0.0 && stretched < 1.0;
      CHECK(close(results.grad_v[i], moves ? grad_up * 1.2 * sigmoid * (1.0 - sigmoid) : 0.0, 1e-5));
    }
    CHECK(close(results.grad_step[channel], grad_step, 1e-5));
  }
  CHECK(close(results.penalty, penalty, 1e-5));
  const Results parallel = run(c, kTwoThreads);
  CHECK(parallel.y == results.y && parallel.grad_v == results.grad_v && parallel.grad_step == results.grad_step &&
        parallel.penalty == results.penalty);
}

void test_what_has_no_slope() {
  Case c(1, 4, 1.0f);
  c.v = {0.0f, 200.0f, -200.0f, kNan};
  c.base = {-20.0f, 2.0f, 2.0f, 2.0f};
  c.weight.base = c.base.data();
  c.weight.v = c.v.data();
  const Results results = run(c, kSerial);
  CHECK(results.y[1] == 3.0f * c.step[0] && results.y[2] == 2.0f * c.step[0] && std::isnan(results.y[3]));
  for (std::size_t i = 0; i < 3; ++i) CHECK(results.grad_v[i] == 0.0f);
  CHECK(std::isnan(results.grad_v[3]) && std::isnan(results.penalty));
}

void test_logarithms() {
  for (float x = 1.0f; x > 1e-30f; x *= 0.9999f) {
    const double exact = std::log(static_cast<double>(x));
    CHECK(std::abs(static_cast<double>(log_of_share(x)) - exact) <= 1.5e-7 * std::abs(exact));
  }
  CHECK(log_of_share(1.0f) == 0.0f && exp_of_negative(log_of_share(0.0f)) == 0.0f);
  CHECK(log_of_share(0.0f) > -100.0f);  // a power of 0 has it times 0
  CHECK(std::isnan(log_of_share(kNan)));
}

}  // namespace

int main() {
  for (const float sharpness : {1.0f, 2.4f, 20.0f}) {
    test_against_oracle({1, 1, sharpness});
    test_against_oracle({300, 9, sharpness});
    test_against_oracle({5, 1000, sharpness});
    test_against_oracle({2, 20'000, sharpness});
  }
  test_what_has_no_slope();
  test_logarithms();
  Case nothing(3, 0, 2.0f);
  const Results results = run(nothing, kTwoThreads);
  CHECK(results.penalty == 0.0f && results.grad_step == std::vector<float>(3, 0.0f));
}
