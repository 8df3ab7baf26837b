// What the tests share: checks that say where they failed, a thread pool, random tensors and the float64 oracle.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/channels.h"
#include "cpu/parallel.h"

namespace gdfq::testing {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

// Equal, or both NaN.
inline bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!same(a[i], b[i])) return false;
  }
  return true;
}

inline bool close(double value, double expected, double tolerance) {
  return std::abs(value - expected) <= tolerance * (1.0 + std::abs(expected));
}

inline void run_on_two_threads(std::int64_t count, cpu::Parallel::Body body, void* context) {
  const std::int64_t middle = count / 2;
  std::thread other([=] { body(0, middle, context); });
  body(middle, count, context);
  other.join();
}

constexpr cpu::Parallel kTwoThreads{run_on_two_threads};

// Layouts that exercise every path: long and short planes, planes longer than a block, one channel, many channels,
// channels_last, odd sizes, nothing.
inline std::vector<ChannelShape> shapes() {
  return {{2, 3, 49}, {3, 5, 17}, {1, 2, 20000}, {7, 3, 1}, {40, 16, 1}, {300, 70, 1}, {2, 4, 4},
          {5, 3, 15}, {1, 1, 5},  {1, 1, 30001}, {0, 4, 1}, {0, 2, 64},  {6, 200, 3},  {9, 2, 1000}};
}

inline std::vector<float> random_values(std::int64_t count, unsigned seed, float mean = 0.0f, float deviation = 2.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(mean, deviation);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = distribution(generator);
  return values;
}

inline std::size_t channel_of(const ChannelShape& shape, std::size_t i) {
  return i / static_cast<std::size_t>(shape.inner) % static_cast<std::size_t>(shape.channels);
}

constexpr Scheme kSchemes[] = {Scheme::kEq6, Scheme::kAffine, Scheme::kSymmetric};

// The quantizers as formulas. Their float32 coefficients belong to the definition; the rest is float64.
struct Oracle {
  double scale;
  double zero = 0.0;
  double low;
  double high;

  Oracle(float lower, float upper, int bits, Scheme scheme = Scheme::kEq6) {
    const double half = std::ldexp(1.0, bits - 1);
    const auto levels = static_cast<float>(2.0 * half - 1.0);
    if (scheme == Scheme::kSymmetric) {
      scale = 1.0 / static_cast<double>(std::fmax(std::fmax(-lower, upper), 5e-9f) / static_cast<float>(half - 1.0));
      low = 1.0 - half;
      high = half - 1.0;
    } else if (scheme == Scheme::kAffine) {
      const float l = std::fmin(lower, 0.0f), step = std::fmax(std::fmax(upper, 0.0f) - l, 1e-8f) / levels;
      scale = 1.0 / static_cast<double>(step);
      low = std::nearbyint(l / step);
      high = low + static_cast<double>(levels);
    } else {
      const float coefficient = levels / std::fmax(upper - lower, 1e-8f);
      scale = coefficient;
      zero = std::nearbyint(coefficient * lower) + half;
      low = -half;
      high = half - 1.0;
    }
  }

  // The distance from a boundary between two levels, where float32 may fall on either side.
  double distance_from_tie(double x) const {
    const double position = scale * x - zero;
    return std::abs(position - std::floor(position) - 0.5);
  }

  double level(double x) const { return std::nearbyint(scale * x - zero); }
  bool inside(double x) const { return level(x) >= low && level(x) <= high; }
  double code(double x) const { return std::fmin(std::fmax(level(x), low), high); }
  double quantize(double x) const { return (code(x) + zero) / scale; }
};

// Frozen batch normalization in float64.
struct NormOracle {
  double scale;
  double shift;
  double inverse_std;

  NormOracle(double weight, double bias, double mean, double variance, double epsilon)
      : scale(weight / std::sqrt(variance + epsilon)),
        shift(bias - mean * scale),
        inverse_std(1.0 / std::sqrt(variance + epsilon)) {}

  double operator()(double x) const { return x * scale + shift; }
};

}  // namespace gdfq::testing
