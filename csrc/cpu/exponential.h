// exp in plain arithmetic, which vectorizes where a call of the library's does not.
#pragma once

#include "../kernels/float16.h"

namespace gdfq::cpu {

// Of numbers that are not positive, to about a unit in the last place; 0 where it is below the normal numbers. NaN
// stays NaN.
//   x = n ln 2 + r, |r| <= ln 2 / 2        exp(x) = 2^n (1 + r + r^2 / 2! + ... + r^7 / 7!)
GDFQ_HD float exp_of_negative(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: added, it rounds to a whole number and leaves it in the low bits
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: n times the first is exact
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r * r + r + 1.0f;
  const float power = bits_float((float_bits(shifted) << 23) + float_bits(1.0f));
  return x < -87.0f ? 0.0f : sum * power;
}

}  // namespace gdfq::cpu
