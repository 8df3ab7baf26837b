// Quantization of tensors: every layout against the oracle, the bit mask, one and two threads.
#include "kernels/fake_quantize.h"

#include "cpu/bit_mask.h"
#include "testing.h"

using namespace gdfq;
using namespace gdfq::cpu;
using namespace gdfq::testing;

namespace {

struct Case {
  explicit Case(const ChannelShape& given) : shape(given), x(random_values(given.numel(), 1)) {
    const std::vector<float> widths = random_values(2 * shape.channels, 2);
    for (std::size_t c = 0; c < static_cast<std::size_t>(shape.channels); ++c) {
      lower.push_back(-std::abs(widths[2 * c]) - 0.1f);
      upper.push_back(std::abs(widths[2 * c + 1]) + 0.1f);
    }
  }

  Ranges ranges(int bits, Scheme scheme) const { return {lower.data(), upper.data(), bits, scheme}; }

  ChannelShape shape;
  std::vector<float> x, lower, upper;
};

std::vector<std::uint8_t> bytes_for(const Case& c) { return std::vector<std::uint8_t>((c.x.size() + 7) / 8, 0xff); }

void test_against_oracle(const Case& c, int bits, Scheme scheme) {
  std::vector<float> y(c.x.size(), -1.0f), clipped(c.x.size(), -1.0f);
  std::vector<std::uint8_t> mask = bytes_for(c);
  fake_quantize(c.x.data(), y.data(), ElementType::kFloat32, c.shape, c.ranges(bits, scheme), kSerial);
  fake_quantize_clipped(c.x.data(), clipped.data(), mask.data(), ElementType::kFloat32, c.shape, c.ranges(bits, scheme),
                        kSerial);
  CHECK(same(y, clipped));
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    const std::size_t channel = channel_of(c.shape, i);
    const Oracle oracle(c.lower[channel], c.upper[channel], bits, scheme);
    const bool bit = (mask[i / 8] >> (i % 8) & 1) != 0;
    if (oracle.distance_from_tie(c.x[i]) < 1e-3) continue;
    CHECK(close(y[i], oracle.quantize(c.x[i]), 1e-6));
    CHECK(bit == oracle.inside(c.x[i]));
  }
  for (std::size_t i = c.x.size(); i < 8 * mask.size(); ++i) CHECK((mask[i / 8] >> (i % 8) & 1) == 0);
}

void test_threads_do_not_matter(const Case& c, Scheme scheme) {
  std::vector<float> one(c.x.size()), two(c.x.size());
  std::vector<std::uint8_t> mask_of_one = bytes_for(c), mask_of_two = bytes_for(c);
  fake_quantize_clipped(c.x.data(), one.data(), mask_of_one.data(), ElementType::kFloat32, c.shape, c.ranges(4, scheme),
                        kSerial);
  fake_quantize_clipped(c.x.data(), two.data(), mask_of_two.data(), ElementType::kFloat32, c.shape, c.ranges(4, scheme),
                        kTwoThreads);
  CHECK(one == two && mask_of_one == mask_of_two);
}

// The gradient is selected by the mask alone, also where it is not finite.
void test_backward(const Case& c) {
  std::vector<std::uint8_t> mask = bytes_for(c);
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<std::uint8_t>(37 * i + 11);
  std::vector<float> grad_y = random_values(c.shape.numel(), 3), grad_x(grad_y.size(), -1.0f);
  if (!grad_y.empty()) grad_y[0] = kNan;
  fake_quantize_clipped_backward(grad_y.data(), mask.data(), grad_x.data(), ElementType::kFloat32, c.shape.numel(),
                                 kTwoThreads);
  for (std::size_t i = 0; i < grad_y.size(); ++i) {
    CHECK(same(grad_x[i], (mask[i / 8] >> (i % 8) & 1) != 0 ? grad_y[i] : 0.0f));
  }
}

// Half precision is stored, not computed in: the result is the float32 result, rounded once.
template <class T>
void test_half_precision(const Case& c, ElementType type, Scheme scheme) {
  std::vector<T> x, y(c.x.size());
  std::vector<float> widened, expected(c.x.size());
  for (const float value : c.x) x.push_back(from_float<T>(value));
  for (const T value : x) widened.push_back(to_float(value));
  fake_quantize(x.data(), y.data(), type, c.shape, c.ranges(8, scheme), kSerial);
  fake_quantize(widened.data(), expected.data(), ElementType::kFloat32, c.shape, c.ranges(8, scheme), kSerial);
  for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i].bits == from_float<T>(expected[i]).bits);
}

void test_nan_and_bad_ranges(Scheme scheme) {
  const std::vector<float> x = {kNan, 0.5f, 0.5f, 0.5f, kInfinity};
  const std::vector<float> lower = {-1.0f, 1.0f, kNan, -kInfinity, -1.0f};
  const std::vector<float> upper = {1.0f, -1.0f, 1.0f, 1.0f, 1.0f};
  std::vector<float> y(5);
  fake_quantize(x.data(), y.data(), ElementType::kFloat32, {1, 5, 1}, {lower.data(), upper.data(), 4, scheme}, kSerial);
  for (std::size_t i = 0; i < 4; ++i) CHECK(std::isnan(y[i]));
  CHECK(std::isfinite(y[4]));
}

}  // namespace

int main() {
  for (const ChannelShape& shape : shapes()) {
    const Case c(shape);
    test_backward(c);
    for (const Scheme scheme : kSchemes) {
      for (const int bits : {2, 4, 8}) test_against_oracle(c, bits, scheme);
      test_threads_do_not_matter(c, scheme);
      test_half_precision<Half>(c, ElementType::kFloat16, scheme);
      test_half_precision<BFloat16>(c, ElementType::kBFloat16, scheme);
    }
  }
  for (const Scheme scheme : kSchemes) test_nan_and_bad_ranges(scheme);
}
