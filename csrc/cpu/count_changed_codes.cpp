// How many codes of a weight change in steps of several sizes, for AIT's choice of one (CVPR 2022): each output channel
// keeps the range that it has before the step.
// Bytes per element: 8 where a channel and its direction fit the cache.
#include "../kernels/count_changed_codes.h"

#include "channel_tasks.h"
#include "minmax.h"

namespace gdfq::cpu {
namespace {

using Counts = std::array<std::int64_t, kMostKappas>;

constexpr std::int64_t kStrip = 1024;  // codes that are kept while all sizes are tried

template <class Quantizer>
GDFQ_CLONES void code_run(const float* weight, float* codes, std::int64_t length, Quantizer quantizer) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) codes[i] = code_of(weight[i], quantizer);
}

template <class Quantizer>
GDFQ_CLONES std::int32_t changed_run(const float* weight, const float* direction, const float* codes,
                                     std::int64_t length, float size, Quantizer quantizer) {
  std::int32_t changed = 0;
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) {
    changed += code_of(step(weight[i], size, direction[i]), quantizer) != codes[i];
  }
  return changed;
}

template <class Quantizer>
void add_channel(const float* weight, const float* direction, std::int64_t length, const Quantizer& quantizer,
                 const std::vector<float>& sizes, Counts& counts) {
  float codes[kStrip];
  for (std::int64_t begin = 0; begin < length; begin += kStrip) {
    const std::int64_t count = std::min(kStrip, length - begin);
    code_run(weight + begin, codes, count, quantizer);
    for (std::size_t k = 0; k < sizes.size(); ++k) {
      counts[k] += changed_run(weight + begin, direction + begin, codes, count, sizes[k], quantizer);
    }
  }
}

}  // namespace

void count_changed_codes(const std::vector<WeightStep>& weights, const float* learning_rate, const float* kappas,
                         int count, std::int64_t* counts, const Parallel& parallel) {
  std::vector<float> sizes;
  for (int k = 0; k < count; ++k) sizes.push_back(fp32::multiply(kappas[k], *learning_rate));
  const std::vector<ChannelTask<WeightStep>> tasks = channel_tasks(weights);
  std::vector<Counts> of_task(tasks.size(), Counts{});
  parallel_for(parallel, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t first, std::int64_t last) {
    for (auto t = static_cast<std::size_t>(first); t < static_cast<std::size_t>(last); ++t) {
      const WeightStep& weight = *tasks[t].weight;
      for (std::int64_t channel = tasks[t].first; channel < tasks[t].last; ++channel) {
        const std::int64_t offset = channel * weight.length;
        const Range range = range_of(weight.weight + offset, weight.length);
        with_quantizer(weight.scheme, [&](auto scheme) {
          using Quantizer = decltype(scheme);
          const auto quantizer = Quantizer::make(range.lower, range.upper, weight.bits, weight.scheme);
          add_channel(weight.weight + offset, weight.direction + offset, weight.length, quantizer, sizes, of_task[t]);
        });
      }
    }
  });
  std::fill_n(counts, static_cast<std::int64_t>(weights.size()) * count, 0);
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    std::int64_t* of_weight = counts + (tasks[t].weight - weights.data()) * count;
    for (int k = 0; k < count; ++k) of_weight[k] += of_task[t][static_cast<std::size_t>(k)];
  }
}

}  // namespace gdfq::cpu
