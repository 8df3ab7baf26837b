// Activations with a learned step against their expression in float64: values, gradients, what stays, threads.
#include "kernels/fake_quantize_learned.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

constexpr float kStep = 0.21f;
constexpr float kZeroPoint = 5.0f;
constexpr LearnedSteps kLearned{&kStep, &kZeroPoint, 0.0f, 15.0f};
constexpr double kScale = 0.125;

std::vector<std::uint8_t> bytes_for(std::size_t count) {
  std::vector<std::uint8_t> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::uint8_t>(91 * i + 13 * (i / 256));
  return bytes;
}

struct Gradients {
  std::vector<float> of_x;
  float of_step = -1.0f;
};

Gradients backward(const std::vector<float>& grad_y, const std::vector<float>& x, const LearnedSteps& learned,
                   const Choice& choice, const Parallel& parallel = kSerial) {
  Gradients gradients;
  gradients.of_x.assign(x.size(), -1.0f);
  fake_quantize_learned_backward(grad_y.data(), x.data(), gradients.of_x.data(), &gradients.of_step,
                                 ElementType::kFloat32, static_cast<std::int64_t>(x.size()), learned, choice, kScale,
                                 parallel);
  return gradients;
}

void test_against_oracle(std::int64_t numel, const Choice& choice) {
  const std::vector<float> x = random_values(numel, 1), grad_y = random_values(numel, 2);
  std::vector<float> y(x.size(), -1.0f);
  fake_quantize_learned(x.data(), y.data(), ElementType::kFloat32, numel, kLearned, choice, kSerial);
  const Gradients gradients = backward(grad_y, x, kLearned, choice);
  double of_step = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double steps = static_cast<double>(x[i] / kStep), level = std::nearbyint(steps);
    const double clamped = std::fmin(std::fmax(level, -5.0), 10.0);
    const bool stays = choice.bytes != nullptr && choice.bytes[i] < choice.threshold;
    CHECK(y[i] == (stays ? x[i] : static_cast<float>(clamped) * kStep));
    CHECK(gradients.of_x[i] == (stays || level == clamped ? grad_y[i] : 0.0f));
    if (!stays) of_step += static_cast<double>(grad_y[i]) * (level == clamped ? level - steps : clamped);
  }
  CHECK(close(gradients.of_step, kScale * of_step, 1e-5));
  const Gradients parallel = backward(grad_y, x, kLearned, choice, kTwoThreads);
  CHECK(same(parallel.of_x, gradients.of_x) && parallel.of_step == gradients.of_step);
}

// Half precision is stored, not computed in: the result is the float32 result, rounded once.
template <class T>
void test_half_precision(ElementType type, const Choice& choice) {
  const std::vector<float> values = random_values(1000, 1);
  std::vector<T> x, y(values.size());
  std::vector<float> widened, expected(values.size());
  for (const float value : values) x.push_back(from_float<T>(value));
  for (const T value : x) widened.push_back(to_float(value));
  fake_quantize_learned(x.data(), y.data(), type, 1000, kLearned, choice, kSerial);
  fake_quantize_learned(widened.data(), expected.data(), ElementType::kFloat32, 1000, kLearned, choice, kSerial);
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i].bits == from_float<T>(expected[i]).bits);
}

void test_steps_that_are_none(const Choice& choice) {
  const std::vector<float> x = random_values(100, 1);
  std::vector<float> y(x.size());
  for (const float step : {0.0f, -1.0f, kNan, kInfinity}) {
    fake_quantize_learned(x.data(), y.data(), ElementType::kFloat32, 100, {&step, &kZeroPoint, 0.0f, 15.0f}, choice,
                          kSerial);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const bool stays = choice.bytes[i] < choice.threshold;
      CHECK(stays ? y[i] == x[i] : std::isnan(y[i]));
    }
  }
}

}  // namespace

int main() {
  const std::vector<std::uint8_t> bytes = bytes_for(50'000);
  for (const std::int64_t numel : {1, 15, 1024, 8192, 8193, 50'000}) {
    test_against_oracle(numel, {nullptr, 0});
    for (const int threshold : {0, 77, 256}) test_against_oracle(numel, {bytes.data(), threshold});
  }
  test_half_precision<Half>(ElementType::kFloat16, {bytes.data(), 128});
  test_half_precision<BFloat16>(ElementType::kBFloat16, {bytes.data(), 128});
  test_steps_that_are_none({bytes.data(), 128});
  CHECK(backward({}, {}, kLearned, {nullptr, 0}).of_step == 0.0f);
}
