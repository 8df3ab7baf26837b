// Eq. 10 against its expression in float64: labels and shares, weights of samples, logits of any size.
#include "kernels/distillation_loss.h"

#include "cpu/exponential.h"
#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

struct Losses {
  float loss = -1.0f, cross_entropy = -1.0f, kl = -1.0f;
  std::vector<float> gradient;
};

Losses run(const std::vector<float>& student, const std::vector<float>& teacher, const Targets& targets,
           std::int64_t batch, const DistillationWeights& weights, const Parallel& parallel = kSerial) {
  Losses result;
  result.gradient.assign(student.size(), -1.0f);
  const std::int64_t classes = static_cast<std::int64_t>(student.size()) / batch;
  distillation_loss(student.data(), teacher.data(), targets, batch, classes, weights, &result.loss,
                    &result.cross_entropy, &result.kl, result.gradient.data(), parallel);
  return result;
}

// log softmax(x / temperature) of one row.
std::vector<double> log_softmax(const float* x, std::size_t classes, double temperature) {
  double greatest = -INFINITY, sum = 0.0;
  for (std::size_t c = 0; c < classes; ++c) greatest = std::fmax(greatest, static_cast<double>(x[c]));
  for (std::size_t c = 0; c < classes; ++c) sum += std::exp((static_cast<double>(x[c]) - greatest) / temperature);
  std::vector<double> result;
  for (std::size_t c = 0; c < classes; ++c) {
    result.push_back((static_cast<double>(x[c]) - greatest) / temperature - std::log(sum));
  }
  return result;
}

void test_against_oracle(std::size_t batch, std::size_t classes, bool soft, bool weighted, bool batchmean,
                         float deviation) {
  const auto images = static_cast<std::int64_t>(batch);
  const std::vector<float> student = random_values(images * static_cast<std::int64_t>(classes), 1, 0.0f, deviation);
  const std::vector<float> teacher = random_values(images * static_cast<std::int64_t>(classes), 2, 0.0f, deviation);
  const std::vector<float> shares = random_values(images * static_cast<std::int64_t>(classes), 3);
  const std::vector<float> sample_weight = random_values(images, 4);
  std::vector<std::int64_t> labels;
  for (std::size_t n = 0; n < batch; ++n) labels.push_back(static_cast<std::int64_t>(7 * n % classes));
  const Targets targets{soft ? nullptr : labels.data(), soft ? shares.data() : nullptr,
                        weighted ? sample_weight.data() : nullptr};
  const DistillationWeights weights{4.0f, 0.5f, 2.0f, batchmean};
  const Losses actual = run(student, teacher, targets, images, weights);

  const double count = static_cast<double>(batch) * (batchmean ? 1.0 : static_cast<double>(classes));
  double cross_entropy = 0.0, kl = 0.0;
  for (std::size_t n = 0; n < batch; ++n) {
    const std::vector<double> plain = log_softmax(&student[n * classes], classes, 1.0);
    const std::vector<double> q = log_softmax(&student[n * classes], classes, 4.0);
    const std::vector<double> p = log_softmax(&teacher[n * classes], classes, 4.0);
    const double factor = (weighted ? static_cast<double>(sample_weight[n]) : 1.0) / static_cast<double>(batch);
    const auto target = [&](std::size_t c) {
      if (soft) return static_cast<double>(shares[n * classes + c]);
      return static_cast<std::int64_t>(c) == labels[n] ? 1.0 : 0.0;
    };
    double total = 0.0;
    for (std::size_t c = 0; c < classes; ++c) total += target(c);
    for (std::size_t c = 0; c < classes; ++c) {
      cross_entropy -= factor * target(c) * plain[c];
      kl += std::exp(p[c]) * (p[c] - q[c]) / count;
      const double gradient = 0.5 * factor * (total * std::exp(plain[c]) - target(c)) +
                              2.0 * 4.0 / count * (std::exp(q[c]) - std::exp(p[c]));
      CHECK(close(actual.gradient[n * classes + c], gradient, 2e-6));
    }
  }
  CHECK(close(actual.cross_entropy, cross_entropy, 1e-5));
  CHECK(close(actual.kl, kl, 1e-5));
  CHECK(close(actual.loss, 0.5 * cross_entropy + 2.0 * 16.0 * kl, 1e-5));
  const Losses parallel = run(student, teacher, targets, images, weights, kTwoThreads);
  CHECK(same(parallel.gradient, actual.gradient) && parallel.loss == actual.loss);
}

void test_labels_that_are_no_class() {
  const std::vector<float> student = random_values(3 * 5, 1), teacher = random_values(3 * 5, 2);
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{5}, std::int64_t{1} << 32}) {
    const std::int64_t labels[] = {0, bad, 4};
    const Losses losses = run(student, teacher, {labels, nullptr, nullptr}, 3, {4.0f, 1.0f, 1.0f, true});
    CHECK(std::isnan(losses.loss) && std::isnan(losses.cross_entropy) && std::isfinite(losses.kl));
    for (std::size_t i = 0; i < 15; ++i) CHECK(std::isnan(losses.gradient[i]) == (i / 5 == 1));
  }
}

void test_nan_logits_show() {
  for (const bool of_teacher : {false, true}) {
    std::vector<float> student = random_values(2 * 40, 1), teacher = random_values(2 * 40, 2);
    (of_teacher ? teacher : student)[39] = kNan;
    const std::int64_t labels[] = {0, 1};
    const Losses losses = run(student, teacher, {labels, nullptr, nullptr}, 2, {4.0f, 1.0f, 1.0f, true});
    CHECK(std::isnan(losses.loss) && std::isnan(losses.kl) && std::isnan(losses.cross_entropy) != of_teacher);
    for (std::size_t i = 0; i < 80; ++i) CHECK(std::isnan(losses.gradient[i]) == (i < 40));
  }
}

void test_exponentials() {
  for (float x = 0.0f; x > -87.0f; x -= 0.001f) {
    const double exact = std::exp(static_cast<double>(x));
    CHECK(std::abs(static_cast<double>(exp_of_negative(x)) - exact) <= 1.2e-7 * exact);
  }
  CHECK(exp_of_negative(0.0f) == 1.0f && exp_of_negative(-100.0f) == 0.0f && exp_of_negative(-kInfinity) == 0.0f);
  CHECK(std::isnan(exp_of_negative(kNan)));
}

}  // namespace

int main() {
  for (const bool soft : {false, true}) {
    for (const bool weighted : {false, true}) {
      test_against_oracle(1, 1, soft, weighted, true, 3.0f);
      test_against_oracle(7, 10, soft, weighted, false, 3.0f);
      test_against_oracle(40, 33, soft, weighted, true, 30.0f);
      test_against_oracle(5, 1000, soft, weighted, false, 3.0f);
      test_against_oracle(3, 9001, soft, weighted, true, 3.0f);
    }
  }
  test_labels_that_are_no_class();
  test_nan_logits_show();
  test_exponentials();
}
