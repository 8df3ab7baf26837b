// The minimum and the maximum of a tensor, into an exponential moving average that corrects its own bias:
//   average <- m * average + (1 - m) * new,  weight <- m * weight + (1 - m),  result = average / weight.
// Bytes per element (float32): 4.
#include "../kernels/observe_range.h"

#include <vector>

#include "minmax.h"

namespace gdfq::cpu {
namespace {

template <class T>
Range range_of_all(const T* x, std::int64_t numel, const Parallel& parallel) {
  const std::int64_t blocks = (numel + kBlock - 1) / kBlock;
  std::vector<Range> ranges(static_cast<std::size_t>(blocks));
  parallel_for(parallel, blocks, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t begin = block * kBlock;
      ranges[static_cast<std::size_t>(block)] = range_of(x + begin, std::min(kBlock, numel - begin));
    }
  });
  Range all;
  for (const Range& range : ranges) all.include(range.lower, range.upper);
  return all;
}

void blend(float& average, float value, float momentum, float rest) {
  average = fp32::add(fp32::multiply(momentum, average), fp32::multiply(rest, value));
}

}  // namespace

void observe_range(const void* x, float* state, float* average, ElementType type, std::int64_t numel, double momentum,
                   const Parallel& parallel) {
  if (numel > 0) {
    Range range;
    with_type(type, [&](auto tag) {
      range = range_of_all(static_cast<const typename decltype(tag)::type*>(x), numel, parallel);
    });
    const float keep = static_cast<float>(momentum);
    const float rest = static_cast<float>(1.0 - momentum);
    blend(state[0], range.lower, keep, rest);
    blend(state[1], range.upper, keep, rest);
    state[2] = fp32::add(fp32::multiply(keep, state[2]), rest);
  }
  average[0] = fp32::divide(state[0], state[2]);
  average[1] = fp32::divide(state[1], state[2]);
}

}  // namespace gdfq::cpu
