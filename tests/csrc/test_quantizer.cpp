// The arithmetic of one element: closed-form values, ties, and what is not finite.
#include "kernels/quantizer.h"

#include <iterator>

#include "testing.h"

using namespace gdfq;
using namespace gdfq::testing;

namespace {

void test_closed_form() {
  // Range [0, 15] at 4 bits: scale 1, zero 8, so that every integer of the range is a level.
  const Quantizer quantizer = make_quantizer(0.0f, 15.0f, 4);
  CHECK(quantizer.scale == 1.0f && quantizer.zero == 8.0f && quantizer.low == -8.0f && quantizer.high == 7.0f);
  for (int i = 0; i <= 15; ++i) CHECK(fake_quantize(static_cast<float>(i), quantizer) == static_cast<float>(i));
  CHECK(fake_quantize(-3.0f, quantizer) == 0.0f);
  CHECK(fake_quantize(99.0f, quantizer) == 15.0f);
}

// Range [-8, 7]: scale 1 and zero 0, so that nothing is rounded before the level is.
void test_ties_go_to_even() {
  const Quantizer quantizer = make_quantizer(-8.0f, 7.0f, 4);
  CHECK(fake_quantize(0.5f, quantizer) == 0.0f);
  CHECK(fake_quantize(1.5f, quantizer) == 2.0f);
  CHECK(fake_quantize(2.5f, quantizer) == 2.0f);
  CHECK(fake_quantize(-0.5f, quantizer) == 0.0f && fake_quantize(-1.5f, quantizer) == -2.0f);
  CHECK(fake_quantize(std::nextafter(2.5f, 3.0f), quantizer) == 3.0f);
  CHECK(fake_quantize(std::nextafter(1.5f, 0.0f), quantizer) == 1.0f);
}

void test_levels() {
  for (int bits = 2; bits <= 8; ++bits) {
    const Quantizer quantizer = make_quantizer(-1.0f, 1.0f, bits);
    CHECK(quantizer.high - quantizer.low == std::ldexp(1.0f, bits) - 1.0f);
    CHECK(is_inside(quantizer.low, quantizer) && is_inside(quantizer.high, quantizer));
    CHECK(!is_inside(quantizer.low - 1.0f, quantizer) && !is_inside(quantizer.high + 1.0f, quantizer));
    CHECK(is_inside(kNan, quantizer));
  }
}

void test_not_finite() {
  const Quantizer quantizer = make_quantizer(-1.0f, 1.0f, 4);
  CHECK(std::isnan(fake_quantize(kNan, quantizer)));
  CHECK(fake_quantize(kInfinity, quantizer) == fake_quantize(100.0f, quantizer));
  CHECK(fake_quantize(-kInfinity, quantizer) == fake_quantize(-100.0f, quantizer));
  const float ranges[][2] = {{1.0f, -1.0f},      {kNan, 1.0f},       {-1.0f, kNan},          {kNan, kNan},
                             {-kInfinity, 1.0f}, {-1.0f, kInfinity}, {-kInfinity, kInfinity}};
  for (const auto& range : ranges) CHECK(std::isnan(fake_quantize(0.5f, make_quantizer(range[0], range[1], 4))));
}

void test_empty_range() {
  const Quantizer quantizer = make_quantizer(0.0f, 0.0f, 4);
  CHECK(fake_quantize(0.0f, quantizer) == 0.0f);
  CHECK(quantizer.scale == 15.0f / 1e-8f);
}

bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

FastQuantizer fast_with(float scale, float zero) { return make_fast({scale, zero, -128.0f, 127.0f}); }

// The quotients of a level and its zero point without a division are those of the division: every numerator of a range
// that has 0 in it, up to powers of two, for one of 37 of all divisors, up to powers of two.
void test_quotients() {
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 37) {
    const float scale =
        std::ldexp(1.0f + static_cast<float>(mantissa) * 0x1p-23f, static_cast<int>(mantissa % 61) - 40);
    const FastQuantizer fast = fast_with(scale, 0.0f);
    for (float numerator = 1.0f; numerator < 512.0f; numerator += 2.0f) {
      CHECK(dequantize(numerator, fast) == numerator / scale);
    }
  }
}

// Whatever the range: one that begins far from 0, an empty one, one of a single huge number, inverted, infinite, NaN.
void test_every_level_of_any_range() {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> mantissa(-2.0f, 2.0f);
  std::uniform_int_distribution<int> exponent(-149, 127);
  const float special[] = {0.0f, -0.0f, kNan, kInfinity, -kInfinity, 0x1p127f, -0x1p127f, 3e38f, -3e38f, 1e-45f};
  for (int i = 0; i < 300'000; ++i) {
    float bounds[2];
    for (float& bound : bounds) {
      bound =
          random() % 16 == 0 ? special[random() % std::size(special)] : std::ldexp(mantissa(random), exponent(random));
    }
    if (random() % 4 == 0) bounds[1] = bounds[0] * (1.0f + std::ldexp(1.0f, -static_cast<int>(random() % 24)));
    const int bits = 2 + static_cast<int>(random() % 7);
    const Quantizer quantizer = make_quantizer(std::fmin(bounds[0], bounds[1]), std::fmax(bounds[0], bounds[1]), bits);
    const FastQuantizer fast = make_fast(quantizer);
    const bool within = std::fmax(std::abs(bounds[0]), std::abs(bounds[1])) < 0x1p125f;
    for (const float level : {quantizer.low, quantizer.low + 1.0f, -1.0f, -0.0f, 1.0f, quantizer.high, kNan}) {
      const float quotient = dequantize(level, quantizer), value = dequantize(level, fast);
      const bool next = value == std::nextafter(quotient, kInfinity) || value == std::nextafter(quotient, -kInfinity);
      CHECK(same_bits(value, quotient) || (!within && next));
    }
  }
}

void test_activation() {
  const Bounds none = bounds_of(Activation::kNone), relu = bounds_of(Activation::kRelu);
  const Bounds relu6 = bounds_of(Activation::kRelu6);
  CHECK(activate(-7.0f, none) == -7.0f && activate(-kInfinity, none) == -kInfinity);
  CHECK(activate(-7.0f, relu) == 0.0f && activate(7.0f, relu) == 7.0f);
  CHECK(activate(-7.0f, relu6) == 0.0f && activate(7.0f, relu6) == 6.0f);
  CHECK(std::isnan(activate(kNan, relu6)));
  CHECK(is_active(-1.0f, none) && is_active(-kInfinity, none) && is_active(kNan, relu));
  CHECK(!is_active(0.0f, relu) && is_active(0.1f, relu));
  CHECK(!is_active(6.0f, relu6) && is_active(5.9f, relu6));
}

void test_affine() {
  const Affine affine = make_affine(3.0f, 5.0f, 2.0f, 3.0f, 1.0f);  // 1 / sqrt(3 + 1) is exact
  CHECK(affine.scale == 1.5f && affine.shift == 2.0f && apply_affine(4.0f, affine) == 8.0f);
}

}  // namespace

int main() {
  test_closed_form();
  test_ties_go_to_even();
  test_levels();
  test_not_finite();
  test_quotients();
  test_every_level_of_any_range();
  test_empty_range();
  test_activation();
  test_affine();
}
