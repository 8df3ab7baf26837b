// The arithmetic of one element: closed-form values, ties, and what is not finite.
#include "kernels/quantizer.h"

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
  test_empty_range();
  test_activation();
  test_affine();
}
