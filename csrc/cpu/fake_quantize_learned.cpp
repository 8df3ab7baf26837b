// Activations with a learned step, some of which stay as they are, and the gradients of both in one pass.
// Bytes per element (float32): 9 forward, 13 backward, one of them the choice's.
#include "../kernels/fake_quantize_learned.h"

#include <algorithm>
#include <vector>

#include "channels.h"
#include "lanes.h"

namespace gdfq::cpu {
namespace {

constexpr std::int64_t kStrip = 1024;

template <bool some_stay, class T>
GDFQ_CLONES void forward_run(const T* x, T* y, std::int64_t length, Choice choice, StepQuantizer quantizer) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    const float value = to_float(x[i]);
    const float quantized = fake_quantize(value, quantizer);
    const bool stays = some_stay && choice.bytes[i] < choice.threshold;
    y[i] = from_float<T>(stays ? value : quantized);
  }
}

// Gives what the elements add to the gradient of the step. It is kept for a strip and added up then: bytes and lanes of
// floats in one loop do not vectorize.
template <bool some_stay, class T>
GDFQ_CLONES float backward_run(const T* grad_y, const T* x, T* grad_x, std::int64_t length, Choice choice,
                               StepQuantizer quantizer) {
  float of_step[kStrip];
  float sum = 0.0f;
  for (std::int64_t begin = 0; begin < length; begin += kStrip) {
    const std::int64_t count = std::min(kStrip, length - begin);
    GDFQ_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
      const float gradient = to_float(grad_y[begin + i]);
      const float steps = in_steps(to_float(x[begin + i]), quantizer);
      const float level = fp32::round_half_even(steps);
      const bool stays = some_stay && choice.bytes[begin + i] < choice.threshold;
      grad_x[begin + i] = from_float<T>(stays | is_inside(level, quantizer) ? gradient : 0.0f);
      const float slope = gradient * slope_of_step(steps, level, quantizer);
      of_step[i] = stays ? 0.0f : slope;
    }
    sum += sum_of(count, [&](std::int64_t i) GDFQ_INLINE_LAMBDA { return of_step[i]; });
  }
  return sum;
}

}  // namespace

void fake_quantize_learned(const void* x, void* y, ElementType type, std::int64_t numel, const LearnedSteps& learned,
                           const Choice& choice, const Parallel& parallel) {
  const StepQuantizer quantizer = learned.quantizer();
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_bool(choice.bytes != nullptr, [&](auto some_stay) {
      parallel_for(parallel, (numel + kBlock - 1) / kBlock, [&](std::int64_t first, std::int64_t last) {
        const std::int64_t begin = first * kBlock;
        forward_run<decltype(some_stay)::value>(static_cast<const T*>(x) + begin, static_cast<T*>(y) + begin,
                                                std::min(last * kBlock, numel) - begin, choice.from(begin), quantizer);
      });
    });
  });
}

void fake_quantize_learned_backward(const void* grad_y, const void* x, void* grad_x, float* grad_step, ElementType type,
                                    std::int64_t numel, const LearnedSteps& learned, const Choice& choice, double scale,
                                    const Parallel& parallel) {
  const StepQuantizer quantizer = learned.quantizer();
  const std::int64_t blocks = (numel + kBlock - 1) / kBlock;
  std::vector<float> partial(static_cast<std::size_t>(blocks));
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_bool(choice.bytes != nullptr, [&](auto some_stay) {
      parallel_for(parallel, blocks, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t block = first; block < last; ++block) {
          const std::int64_t begin = block * kBlock;
          partial[static_cast<std::size_t>(block)] = backward_run<decltype(some_stay)::value>(
              static_cast<const T*>(grad_y) + begin, static_cast<const T*>(x) + begin, static_cast<T*>(grad_x) + begin,
              std::min(kBlock, numel - begin), choice.from(begin), quantizer);
        }
      });
    });
  });
  double sum = 0.0;
  for (const float of_block : partial) sum += of_block;
  *grad_step = static_cast<float>(sum * scale);
}

}  // namespace gdfq::cpu
