// The arithmetic of one element: closed-form values, ties, and what is not finite.
#include "kernels/quantizer.h"

#include <iterator>

#include "testing.h"

using namespace gdfq;
using namespace gdfq::testing;

namespace {

void test_closed_form() {
  // Range [0, 15] at 4 bits: scale 1, zero 8, so that every integer of the range is a level.
  const auto quantizer = Eq6Quantizer::make(0.0f, 15.0f, 4);
  CHECK(quantizer.scale == 1.0f && quantizer.zero == 8.0f && quantizer.low == -8.0f && quantizer.high == 7.0f);
  for (int i = 0; i <= 15; ++i) CHECK(fake_quantize(static_cast<float>(i), quantizer) == static_cast<float>(i));
  CHECK(fake_quantize(-3.0f, quantizer) == 0.0f);
  CHECK(fake_quantize(99.0f, quantizer) == 15.0f);
}

// Range [-8, 7]: scale 1 and zero 0, so that nothing is rounded before the level is.
void test_ties_go_to_even() {
  const auto quantizer = Eq6Quantizer::make(-8.0f, 7.0f, 4);
  CHECK(fake_quantize(0.5f, quantizer) == 0.0f);
  CHECK(fake_quantize(1.5f, quantizer) == 2.0f);
  CHECK(fake_quantize(2.5f, quantizer) == 2.0f);
  CHECK(fake_quantize(-0.5f, quantizer) == 0.0f && fake_quantize(-1.5f, quantizer) == -2.0f);
  CHECK(fake_quantize(std::nextafter(2.5f, 3.0f), quantizer) == 3.0f);
  CHECK(fake_quantize(std::nextafter(1.5f, 0.0f), quantizer) == 1.0f);
}

void test_levels() {
  for (int bits = 2; bits <= 8; ++bits) {
    const auto quantizer = Eq6Quantizer::make(-1.0f, 1.0f, bits);
    CHECK(quantizer.high - quantizer.low == std::ldexp(1.0f, bits) - 1.0f);
    CHECK(is_inside(quantizer.low, quantizer) && is_inside(quantizer.high, quantizer));
    CHECK(!is_inside(quantizer.low - 1.0f, quantizer) && !is_inside(quantizer.high + 1.0f, quantizer));
    CHECK(is_inside(kNan, quantizer));
  }
}

void test_not_finite() {
  const auto quantizer = Eq6Quantizer::make(-1.0f, 1.0f, 4);
  CHECK(std::isnan(fake_quantize(kNan, quantizer)));
  CHECK(fake_quantize(kInfinity, quantizer) == fake_quantize(100.0f, quantizer));
  CHECK(fake_quantize(-kInfinity, quantizer) == fake_quantize(-100.0f, quantizer));
  const float ranges[][2] = {{1.0f, -1.0f},      {kNan, 1.0f},       {-1.0f, kNan},          {kNan, kNan},
                             {-kInfinity, 1.0f}, {-1.0f, kInfinity}, {-kInfinity, kInfinity}};
  for (const auto& range : ranges) {
    CHECK(std::isnan(fake_quantize(0.5f, Eq6Quantizer::make(range[0], range[1], 4))));
    for (const Scheme scheme : {Scheme::kAffine, Scheme::kSymmetric}) {
      const auto step = StepQuantizer::make(range[0], range[1], 4, scheme);
      for (const float x : {0.5f, kInfinity, -kInfinity, kNan}) {
        CHECK(std::isnan(fake_quantize(x, step)) && std::isnan(fake_quantize(x, make_fast(step))));
        CHECK(is_inside(round_to_level(x, make_fast(step)), make_fast(step)));
      }
    }
  }
}

void test_empty_range() {
  const auto quantizer = Eq6Quantizer::make(0.0f, 0.0f, 4);
  CHECK(fake_quantize(0.0f, quantizer) == 0.0f);
  CHECK(quantizer.scale == 15.0f / 1e-8f);
}

bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

FastEq6Quantizer fast_with(float scale, float zero) { return make_fast(Eq6Quantizer{scale, zero, -128.0f, 127.0f}); }

// The quotients of a level and its zero point without a division are those of the division: every numerator of a range
// that has 0 in it, up to powers of two, for one of 37 of all divisors, up to powers of two.
void test_quotients() {
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 37) {
    const float scale =
        std::ldexp(1.0f + static_cast<float>(mantissa) * 0x1p-23f, static_cast<int>(mantissa % 61) - 40);
    const FastEq6Quantizer fast = fast_with(scale, 0.0f);
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
    const auto quantizer = Eq6Quantizer::make(std::fmin(bounds[0], bounds[1]), std::fmax(bounds[0], bounds[1]), bits);
    const FastEq6Quantizer fast = make_fast(quantizer);
    const bool within = std::fmax(std::abs(bounds[0]), std::abs(bounds[1])) < 0x1p125f;
    for (const float level : {quantizer.low, quantizer.low + 1.0f, -1.0f, -0.0f, 1.0f, quantizer.high, kNan}) {
      const float quotient = dequantize(level, quantizer), value = dequantize(level, fast);
      const bool next = value == std::nextafter(quotient, kInfinity) || value == std::nextafter(quotient, -kInfinity);
      CHECK(same_bits(value, quotient) || (!within && next));
    }
  }
}

// Affine from -3 to 12 and symmetric from -7 to 7 at 4 bits have steps of 1.
void test_steps_of_one() {
  const auto affine = StepQuantizer::make(-3.0f, 12.0f, 4, Scheme::kAffine);
  CHECK(affine.step == 1.0f && affine.low == -3.0f && affine.high == 12.0f);
  const auto symmetric = StepQuantizer::make(-2.0f, 7.0f, 4, Scheme::kSymmetric);
  CHECK(symmetric.step == 1.0f && symmetric.low == -7.0f && symmetric.high == 7.0f);
  for (const auto& quantizer : {affine, symmetric}) {
    const auto quantize = [&](float x) { return fake_quantize(x, quantizer); };
    CHECK(quantize(0.5f) == 0.0f && quantize(1.5f) == 2.0f && quantize(2.5f) == 2.0f && quantize(-1.5f) == -2.0f);
    CHECK(same_bits(quantize(-0.5f), 0.0f) && same_bits(quantize(-0.0f), 0.0f));
    CHECK(quantize(kInfinity) == quantizer.high && quantize(-kInfinity) == quantizer.low && std::isnan(quantize(kNan)));
  }
}

void test_ranges_of_steps() {
  // 0 belongs to the affine range; the symmetric one is as long below 0 as above.
  CHECK(StepQuantizer::make(5.0f, 15.0f, 4, Scheme::kAffine).low == 0.0f);
  CHECK(StepQuantizer::make(-15.0f, -5.0f, 4, Scheme::kAffine).high == 0.0f);
  CHECK(StepQuantizer::make(-15.0f, -5.0f, 4, Scheme::kAffine).step == 1.0f);
  CHECK(StepQuantizer::make(-14.0f, 3.0f, 4, Scheme::kSymmetric).step == 2.0f);
  CHECK(StepQuantizer::make(0.0f, 0.0f, 4, Scheme::kAffine).step == 1e-8f / 15.0f);
  CHECK(StepQuantizer::make(0.0f, 0.0f, 4, Scheme::kSymmetric).step == 5e-9f / 7.0f);
  const auto two_bits = StepQuantizer::make(-1.0f, 1.0f, 2, Scheme::kSymmetric);
  CHECK(two_bits.low == -1.0f && two_bits.high == 1.0f);
}

void check_same_level(float x, const StepQuantizer& quantizer) {
  const FastStepQuantizer fast = make_fast(quantizer);
  const float level = round_to_level(x, quantizer), value = round_to_level(x, fast);
  CHECK(is_inside(level, quantizer) == is_inside(value, fast));
  CHECK(same(clamp_level(level, quantizer), clamp_level(value, fast)));
  CHECK(same_bits(fake_quantize(x, quantizer), fake_quantize(x, fast)));
}

// Without a division the level is that of the division: at every half of a level and beside it, for one of 997 of all
// steps, up to powers of two.
void test_levels_beside_halves() {
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 997) {
    const float step =
        std::ldexp(1.0f + static_cast<float>(mantissa) * 0x1p-23f, static_cast<int>(mantissa % 270) - 144);
    const StepQuantizer quantizer{step, -128.0f, 127.0f};
    for (float half = -129.5f; half < 130.0f; half += 1.0f) {
      const float x = half * step;
      for (const float beside : {std::nextafter(x, -kInfinity), x, std::nextafter(x, kInfinity)}) {
        check_same_level(beside, quantizer);
      }
    }
  }
}

void test_levels_of_any_range_and_number() {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> mantissa(-2.0f, 2.0f);
  std::uniform_int_distribution<int> exponent(-149, 127);
  const float special[] = {0.0f, -0.0f, kNan, kInfinity, -kInfinity, 0x1p127f, 3e38f, -3e38f, 1e-45f, 3.4028234e38f};
  const auto any = [&] {
    return random() % 16 == 0 ? special[random() % std::size(special)] : std::ldexp(mantissa(random), exponent(random));
  };
  for (int i = 0; i < 300'000; ++i) {
    const float a = any(), b = random() % 2 == 0 ? any() : a * mantissa(random);
    const Scheme scheme = i % 2 == 0 ? Scheme::kAffine : Scheme::kSymmetric;
    const auto quantizer =
        StepQuantizer::make(std::fmin(a, b), std::fmax(a, b), 2 + static_cast<int>(random() % 7), scheme);
    for (const float x : {any(), a, b, a * mantissa(random), 0.0f, -0.0f, kInfinity, -kInfinity, kNan}) {
      check_same_level(x, quantizer);
    }
    CHECK(std::isnan(quantizer.step) || (quantizer.low <= 0.0f && quantizer.high >= 0.0f));
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
  test_steps_of_one();
  test_ranges_of_steps();
  test_levels_beside_halves();
  test_levels_of_any_range_and_number();
  test_empty_range();
  test_activation();
  test_affine();
}
