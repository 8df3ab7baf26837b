// Quantizers of weights: each output channel between its own minimum and maximum, all layers in one parallel loop.
// Bytes per element (float32): 8 where a channel fits the cache, which it does in every common network.
#include "../kernels/fake_quantize_weight.h"

#include "channel_tasks.h"
#include "minmax.h"

namespace gdfq::cpu {
namespace {

template <class T, class Quantizer>
GDFQ_CLONES void quantize_run(const T* x, T* y, std::int64_t length, Quantizer quantizer) {
  GDFQ_SIMD
  for (std::int64_t i = 0; i < length; ++i) y[i] = from_float<T>(fake_quantize(to_float(x[i]), quantizer));
}

void run_task(const ChannelTask<Weight>& task) {
  const Weight& weight = *task.weight;
  with_type(weight.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_quantizer(weight.scheme, [&](auto scheme) {
      using Quantizer = decltype(scheme);
      for (std::int64_t channel = task.first; channel < task.last; ++channel) {
        const T* values = static_cast<const T*>(weight.values) + channel * weight.length;
        T* quantized = static_cast<T*>(weight.quantized) + channel * weight.length;
        const Range range = range_of(values, weight.length);
        const auto quantizer = Quantizer::make(range.lower, range.upper, weight.bits, weight.scheme);
        quantize_run(values, quantized, weight.length, quantizer);
      }
    });
  });
}

}  // namespace

void fake_quantize_weights(const std::vector<Weight>& weights, const Parallel& parallel) {
  const std::vector<ChannelTask<Weight>> tasks = channel_tasks(weights);
  parallel_for(parallel, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) run_task(tasks[static_cast<std::size_t>(t)]);
  });
}

}  // namespace gdfq::cpu
