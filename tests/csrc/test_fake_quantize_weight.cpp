// Weights: each channel's own range, several layers in one call.
#include "kernels/fake_quantize_weight.h"

#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

std::vector<float> quantize(const std::vector<float>& values, std::int64_t channels, int bits, Scheme scheme,
                            const Parallel& parallel = kSerial) {
  std::vector<float> quantized(values.size(), -1.0f);
  const auto length = static_cast<std::int64_t>(values.size()) / channels;
  fake_quantize_weights({{values.data(), quantized.data(), ElementType::kFloat32, channels, length, bits, scheme}},
                        parallel);
  return quantized;
}

void test_against_oracle(std::int64_t channels, std::int64_t length, int bits, Scheme scheme) {
  const std::vector<float> values = random_values(channels * length, 5);
  const std::vector<float> quantized = quantize(values, channels, bits, scheme);
  for (std::size_t c = 0; c < static_cast<std::size_t>(channels); ++c) {
    const float* begin = values.data() + c * static_cast<std::size_t>(length);
    const float* end = begin + length;
    const Oracle oracle(*std::min_element(begin, end), *std::max_element(begin, end), bits, scheme);
    for (const float* value = begin; value < end; ++value) {
      if (oracle.distance_from_tie(*value) < 1e-3) continue;
      CHECK(close(quantized[static_cast<std::size_t>(value - values.data())], oracle.quantize(*value), 1e-6));
    }
  }
  CHECK(same(quantized, quantize(values, channels, bits, scheme, kTwoThreads)));
}

void test_bad_channel_stays_alone(Scheme scheme) {
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    std::vector<float> values = random_values(3 * 100, 6);
    values[150] = bad;
    const std::vector<float> quantized = quantize(values, 3, 4, scheme);
    for (std::size_t i = 0; i < values.size(); ++i) CHECK(std::isnan(quantized[i]) == (i / 100 == 1));
  }
}

void test_list_is_its_members() {
  const std::vector<float> first = random_values(8 * 27, 7), second = random_values(5 * 1000, 8);
  std::vector<float> y_first(first.size()), y_second(second.size());
  fake_quantize_weights({{first.data(), y_first.data(), ElementType::kFloat32, 8, 27, 4, Scheme::kSymmetric},
                         {nullptr, nullptr, ElementType::kFloat32, 4, 0, 4, Scheme::kEq6},
                         {second.data(), y_second.data(), ElementType::kFloat32, 5, 1000, 8, Scheme::kEq6}},
                        kTwoThreads);
  CHECK(same(y_first, quantize(first, 8, 4, Scheme::kSymmetric)) &&
        same(y_second, quantize(second, 5, 8, Scheme::kEq6)));
}

}  // namespace

int main() {
  for (const Scheme scheme : kSchemes) {
    for (const std::int64_t length : {1, 9, 63, 64, 147, 20000}) test_against_oracle(4, length, 4, scheme);
    test_against_oracle(300, 9, 8, scheme);
    test_bad_channel_stays_alone(scheme);
  }
  test_list_is_its_members();
  fake_quantize_weights({}, kSerial);
}
