// The range observer: the extremes of any length, and the average without bias.
#include "kernels/observe_range.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

struct Observer {
  float state[3] = {0.0f, 0.0f, 0.0f};
  float average[2] = {-1.0f, -1.0f};

  void observe(const std::vector<float>& x, double momentum = 0.9, const Parallel& parallel = kSerial) {
    observe_range(x.data(), state, average, ElementType::kFloat32, static_cast<std::int64_t>(x.size()), momentum,
                  parallel);
  }
};

void test_first_batch_is_its_own_average() {
  for (const std::int64_t length : {1, 7, 63, 64, 65, 8191, 8193, 50001}) {
    const std::vector<float> x = random_values(length, 9);
    for (const Parallel& parallel : {kSerial, kTwoThreads}) {
      Observer observer;
      observer.observe(x, 0.9, parallel);
      CHECK(close(observer.average[0], *std::min_element(x.begin(), x.end()), 1e-6));
      CHECK(close(observer.average[1], *std::max_element(x.begin(), x.end()), 1e-6));
    }
  }
}

void test_average_of_batches() {
  Observer observer;
  double lower = 0.0, upper = 0.0, weight = 0.0;
  for (int batch = 0; batch < 50; ++batch) {
    const float value = static_cast<float>(batch);
    observer.observe({-value, 1.0f, 2.0f * value});
    lower = 0.9 * lower + 0.1 * std::fmin(-value, 1.0);
    upper = 0.9 * upper + 0.1 * std::fmax(2.0 * value, 1.0);
    weight = 0.9 * weight + 0.1;
    CHECK(close(observer.average[0], lower / weight, 1e-5) && close(observer.average[1], upper / weight, 1e-5));
  }
}

void test_nan_anywhere() {
  for (std::size_t place : {0u, 63u, 64u, 9000u, 19999u}) {
    std::vector<float> x = random_values(20000, 10);
    x[place] = kNan;
    Observer observer;
    observer.observe(x);
    CHECK(std::isnan(observer.average[0]) && std::isnan(observer.average[1]));
  }
}

void test_nothing_observed() {
  Observer observer;
  observer.observe({});
  CHECK(std::isnan(observer.average[0]) && observer.state[2] == 0.0f);
  observer.observe({-1.0f, 3.0f});
  observer.observe({});
  CHECK(close(observer.average[0], -1.0, 1e-6) && close(observer.average[1], 3.0, 1e-6));
}

}  // namespace

int main() {
  test_first_batch_is_its_own_average();
  test_average_of_batches();
  test_nan_anywhere();
  test_nothing_observed();
}
