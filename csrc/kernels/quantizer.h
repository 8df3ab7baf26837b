// The quantizers' arithmetic, frozen batch normalization and its activation: one element at a time, for the host and
// for CUDA.
//
// eq6 (GDFQ, Eq. 6):
//   scale = (2^k - 1) / max(u - l, 1e-8)         zero = round(scale * l) + 2^(k-1)
//   q     = clamp(round(scale * x - zero), -2^(k-1), 2^(k-1) - 1)
//   y     = (q + zero) / scale
// affine and symmetric (ONNX's QuantizeLinear and DequantizeLinear):
//   affine       step = max(max(u, 0) - min(l, 0), 1e-8) / (2^k - 1)
//                low  = -round(-min(l, 0) / step)           high = 2^k - 1 + low
//   symmetric    step = max(-l, u, 5e-9) / (2^(k-1) - 1)    high = -low = 2^(k-1) - 1
//   q     = clamp(round(x / step), low, high)
//   y     = q * step
// An inverted range means that something upstream is broken: it gives NaN, as NaN and infinite ranges do.
//
// Every operation is a single float32 operation rounded to nearest, in exactly this order, so that the CPU, CUDA and
// PyTorch agree level by level. Host code must be compiled with -ffp-contract=off; device code names the rounding.
// NaN propagates everywhere: fminf and fmaxf would swallow it.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GDFQ_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GDFQ_HD inline __attribute__((always_inline))  // inlined, a function takes its caller's instruction set
#else
#define GDFQ_HD inline
#endif

namespace gdfq {

namespace fp32 {

// Products, sums and quotients that no compiler may fuse into a multiply-add.
GDFQ_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

GDFQ_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

GDFQ_HD float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

GDFQ_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

GDFQ_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Clamps that are NaN where the value is.
GDFQ_HD float at_least(float a, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(bound));
  return result;
#else
  return a < bound ? bound : a;
#endif
}

GDFQ_HD float at_most(float a, float bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(bound));
  return result;
#else
  return a > bound ? bound : a;
#endif
}

GDFQ_HD float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return sqrtf(a);
#endif
}

GDFQ_HD float round_half_even(float a) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
  return __builtin_rintf(a);
#else
  return rintf(a);
#endif
}

}  // namespace fp32

// One byte: the tables of layers are kernels' arguments, of which there are few bytes.
enum class Scheme : std::int8_t { kEq6 = 0, kAffine = 1, kSymmetric = 2 };

// Eq. 6 for one range. `low` and `high` are the first and the last level, -2^(k-1) and 2^(k-1) - 1.
struct Eq6Quantizer {
  float scale;
  float zero;
  float low;
  float high;

  static GDFQ_HD Eq6Quantizer make(float lower, float upper, int bits, Scheme = Scheme::kEq6) {
    const float half = static_cast<float>(1 << (bits - 1));
    const float levels = static_cast<float>((1 << bits) - 1);
    float range = fp32::subtract(upper, lower);
    range = upper < lower ? NAN : range;
    range = range < 1e-8f ? 1e-8f : range;
    Eq6Quantizer quantizer;
    quantizer.scale = fp32::divide(levels, range);
    quantizer.zero = fp32::add(fp32::round_half_even(fp32::multiply(quantizer.scale, lower)), half);
    quantizer.low = -half;
    quantizer.high = half - 1.0f;
    return quantizer;
  }
};

// Affine or symmetric, for one range. `low` and `high` are the first and the last multiple of the step.
struct StepQuantizer {
  float step;
  float low;
  float high;

  static GDFQ_HD StepQuantizer make(float lower, float upper, int bits, Scheme scheme) {
    const bool affine = scheme == Scheme::kAffine;
    const float levels = static_cast<float>((1 << (affine ? bits : bits - 1)) - 1);
    const float below = fp32::subtract(0.0f, fp32::at_most(lower, 0.0f));
    const float width = affine ? fp32::add(fp32::at_least(upper, 0.0f), below) : fp32::at_least(upper, -lower);
    const float step = fp32::divide(fp32::at_least(width, affine ? 1e-8f : 5e-9f), levels);
    StepQuantizer quantizer;
    quantizer.step = upper >= lower && width < INFINITY ? step : NAN;
    quantizer.low = affine ? -fp32::round_half_even(fp32::divide(below, quantizer.step)) : -levels;
    quantizer.high = affine ? fp32::add(quantizer.low, levels) : levels;
    return quantizer;
  }
};

// Calls function with an object of the type that has the scheme's arithmetic.
template <class Function>
void with_quantizer(Scheme scheme, const Function& function) {
  if (scheme == Scheme::kEq6) {
    function(Eq6Quantizer{});
  } else {
    function(StepQuantizer{});
  }
}

// The level of x, not yet clamped: outside [low, high] the element is clipped.
GDFQ_HD float round_to_level(float x, const Eq6Quantizer& quantizer) {
  return fp32::round_half_even(fp32::subtract(fp32::multiply(quantizer.scale, x), quantizer.zero));
}

GDFQ_HD float in_steps(float x, const StepQuantizer& quantizer) { return fp32::divide(x, quantizer.step); }

GDFQ_HD float round_to_level(float x, const StepQuantizer& quantizer) {
  return fp32::round_half_even(in_steps(x, quantizer));
}

template <class AnyQuantizer>
GDFQ_HD float clamp_level(float level, const AnyQuantizer& quantizer) {
  return fp32::at_most(fp32::at_least(level, quantizer.low), quantizer.high);
}

GDFQ_HD float dequantize(float level, const Eq6Quantizer& quantizer) {
  return fp32::divide(fp32::add(level, quantizer.zero), quantizer.scale);
}

// Adding 0 makes 0 of -0.
GDFQ_HD float dequantize(float level, const StepQuantizer& quantizer) {
  return fp32::multiply(fp32::add(level, 0.0f), quantizer.step);
}

// The clipped straight-through gradient passes where the level was not clamped. NaN was not, and keeps its gradient.
template <class AnyQuantizer>
GDFQ_HD bool is_inside(float level, const AnyQuantizer& quantizer) {
  return !(level < quantizer.low) && !(level > quantizer.high);
}

// A quantizer with what it takes to divide without dividing. CUDA's division is eight instructions, and for a numerator
// of 0, which is what a ReLU makes of half of the elements, a slow path of some forty. Instead there is one Newton step
// from the product with the reciprocal (Markstein, 1990).
struct FastEq6Quantizer : Eq6Quantizer {
  float reciprocal;
  float divisor;
  float correction;
};

GDFQ_HD FastEq6Quantizer make_fast(const Eq6Quantizer& quantizer) {
  FastEq6Quantizer fast{quantizer, fp32::divide(1.0f, quantizer.scale), quantizer.scale, 0.0f};
  const float greatest = (fabsf(quantizer.zero) - quantizer.low) * fast.reciprocal;  // of all results, or NaN
  const bool may_overflow = !(greatest < INFINITY);
  fast.divisor = may_overflow ? -0x1p-100f : quantizer.scale;
  fast.correction = may_overflow ? 0x1p-100f : fast.reciprocal;
  return fast;
}

// The same quotient, correctly rounded: the remainder is exact. A level with its zero point is never -0, of which the
// step would make +0. Where the step might meet infinity, in ranges that reach 2^125, it adds next to nothing, and the
// quotient may be off by a last bit.
GDFQ_HD float dequantize(float level, const FastEq6Quantizer& quantizer) {
  const float value = fp32::add(level, quantizer.zero);
  const float quotient = fp32::multiply(value, quantizer.reciprocal);
  const float remainder = fp32::multiply_add(-quotient, quantizer.divisor, value);
  return fp32::multiply_add(remainder, quantizer.correction, quotient);
}

struct FastStepQuantizer : StepQuantizer {
  float unit;  // a power of two, by which x and the step are multiplied: reciprocal and remainder stay normal
  float divisor;
  float reciprocal;
  float least;  // of x in units: one level beyond the last
  float greatest;
};

GDFQ_HD FastStepQuantizer make_fast(const StepQuantizer& quantizer) {
  const float unit = quantizer.step > 0x1p64f ? 0x1p-64f : quantizer.step < 0x1p-64f ? 0x1p64f : 1.0f;
  const float divisor = fp32::multiply(quantizer.step, unit);
  return {quantizer,
          unit,
          divisor,
          fp32::divide(1.0f, divisor),
          fp32::multiply(quantizer.low - 1.0f, divisor),
          fp32::multiply(quantizer.high + 1.0f, divisor)};
}

// The same level after rounding, but for those beyond [low, high], which all become the nearest such one. The quotient
// may be the neighbor of the correctly rounded one, but never across a half. That has been tried for all 2^23 steps, up
// to powers of two, at every half of a level and the numbers beside it; test_quantizer.cpp tries one of 997.
GDFQ_HD float in_steps(float x, const FastStepQuantizer& quantizer) {
  const float scaled = fp32::multiply(x, quantizer.unit);
  const float value = fp32::at_most(fp32::at_least(scaled, quantizer.least), quantizer.greatest);
  const float quotient = fp32::multiply(value, quantizer.reciprocal);
  const float remainder = fp32::multiply_add(-quotient, quantizer.divisor, value);
  return fp32::multiply_add(remainder, quantizer.reciprocal, quotient);
}

GDFQ_HD float round_to_level(float x, const FastStepQuantizer& quantizer) {
  return fp32::round_half_even(in_steps(x, quantizer));
}

// The same for levels alone, which take no division in Eq. 6.
GDFQ_HD Eq6Quantizer make_fast_at_levels(const Eq6Quantizer& quantizer) { return quantizer; }
GDFQ_HD FastStepQuantizer make_fast_at_levels(const StepQuantizer& quantizer) { return make_fast(quantizer); }

template <class Quantizer>
using Fast = decltype(make_fast(Quantizer{}));
template <class Quantizer>
using FastAtLevels = decltype(make_fast_at_levels(Quantizer{}));

template <class AnyQuantizer>
GDFQ_HD float fake_quantize(float x, const AnyQuantizer& quantizer) {
  return dequantize(clamp_level(round_to_level(x, quantizer), quantizer), quantizer);
}

// Frozen batch normalization of one channel: z = x * scale + shift.
struct Affine {
  float scale;
  float shift;
};

GDFQ_HD float inverse_std(float variance, float epsilon) {
  return fp32::divide(1.0f, fp32::square_root(fp32::add(variance, epsilon)));
}

GDFQ_HD Affine make_affine(float gamma, float beta, float mean, float variance, float epsilon) {
  Affine affine;
  affine.scale = fp32::multiply(gamma, inverse_std(variance, epsilon));
  affine.shift = fp32::subtract(beta, fp32::multiply(mean, affine.scale));
  return affine;
}

GDFQ_HD float apply_affine(float x, const Affine& affine) {
  return fp32::add(fp32::multiply(x, affine.scale), affine.shift);
}

enum class Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

// An activation as the bounds that it clamps to. A bound that is NaN binds nothing: every comparison with it is false.
struct Bounds {
  float low;
  float high;
};

GDFQ_HD Bounds bounds_of(Activation activation) {
  return {activation == Activation::kNone ? NAN : 0.0f, activation == Activation::kRelu6 ? 6.0f : NAN};
}

GDFQ_HD float activate(float z, const Bounds& bounds) {
  z = z < bounds.low ? bounds.low : z;
  return z > bounds.high ? bounds.high : z;
}

// Where the activation passes its gradient; NaN does.
GDFQ_HD bool is_active(float z, const Bounds& bounds) { return !(z <= bounds.low) & !(z >= bounds.high); }

}  // namespace gdfq
