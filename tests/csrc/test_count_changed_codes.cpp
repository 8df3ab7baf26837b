// Codes that a step changes: counted in float64, away from where rounding decides.
#include "kernels/count_changed_codes.h"

#include <algorithm>

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

std::vector<std::int64_t> count(const std::vector<WeightStep>& weights, float learning_rate,
                                const std::vector<float>& kappas, const Parallel& parallel = kSerial) {
  std::vector<std::int64_t> counts(weights.size() * kappas.size(), -1);
  count_changed_codes(weights, &learning_rate, kappas.data(), static_cast<int>(kappas.size()), counts.data(), parallel);
  return counts;
}

void test_against_oracle(std::int64_t channels, std::int64_t length, int bits, Scheme scheme) {
  const std::vector<float> weight = random_values(channels * length, 1),
                           direction = random_values(channels * length, 2);
  const std::vector<float> kappas{0.0f, 1.0f, 8.0f, 1000.0f};
  const std::vector<WeightStep> weights{{weight.data(), direction.data(), channels, length, bits, scheme}};
  const std::vector<std::int64_t> counts = count(weights, 0.01f, kappas);
  CHECK(counts == count(weights, 0.01f, kappas, kTwoThreads));
  for (std::size_t k = 0; k < kappas.size(); ++k) {
    std::int64_t changed = 0, unsure = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      const float* begin = weight.data() + c * length;
      const Oracle oracle(*std::min_element(begin, begin + length), *std::max_element(begin, begin + length), bits,
                          scheme);
      for (std::int64_t i = 0; i < length; ++i) {
        const double before = static_cast<double>(begin[i]);
        const double after = before - static_cast<double>(kappas[k] * 0.01f) *
                                          static_cast<double>(direction[static_cast<std::size_t>(c * length + i)]);
        unsure +=
            kappas[k] > 0.0f && std::fmin(oracle.distance_from_tie(before), oracle.distance_from_tie(after)) < 1e-3;
        changed += oracle.code(before) != oracle.code(after);
      }
    }
    CHECK(std::abs(counts[k] - changed) <= unsure);
    CHECK(unsure <= 1 + channels * length / 50);
  }
}

void test_list_is_its_members() {
  const std::vector<float> weight = random_values(6 * 50, 3), direction = random_values(6 * 50, 4);
  const WeightStep wide{weight.data(), direction.data(), 3, 100, 4, Scheme::kEq6},
      narrow{weight.data(), direction.data(), 6, 50, 8, Scheme::kAffine};
  const std::vector<std::int64_t> alone = count({narrow}, 0.1f, {1.0f, 2.0f});
  const std::vector<std::int64_t> counts =
      count({wide, {nullptr, nullptr, 4, 0, 4, Scheme::kEq6}, narrow}, 0.1f, {1.0f, 2.0f});
  CHECK(counts.size() == 6 && counts[2] == 0 && counts[3] == 0 && counts[4] == alone[0] && counts[5] == alone[1]);
}

}  // namespace

int main() {
  for (const Scheme scheme : kSchemes) {
    for (const std::int64_t length : {9, 1023, 1024, 1025, 20000}) test_against_oracle(4, length, 4, scheme);
    test_against_oracle(300, 9, 8, scheme);
  }
  test_list_is_its_members();
}
