// Eq. 5 over all layers, |mean - running_mean|^2 + |var - running_var|^2, with its gradient. A few thousand numbers:
// one thread is through with them before others would have begun.
#include "../kernels/bns_loss.h"

#include "lanes.h"

namespace gdfq::cpu {
namespace {

GDFQ_CLONES float run_layer(const LayerStatistics& given, float factor, float* of_mean, float* of_variance) {
  const LayerStatistics layer = given;  // a copy, which what is written cannot change
  return sum_of(layer.channels, [=](std::int64_t c) GDFQ_INLINE_LAMBDA {
    const float mean = layer.mean[c] - layer.running_mean[c];
    const float variance = layer.variance[c] - layer.running_var[c];
    of_mean[c] = 2.0f * (factor * mean);
    of_variance[c] = 2.0f * (factor * variance);
    return factor * mean * mean + factor * variance * variance;
  });
}

}  // namespace

void bns_loss(const std::vector<LayerStatistics>& layers, bool average, float* loss, float* gradient, const Parallel&) {
  std::int64_t all_channels = 0;
  for (const LayerStatistics& layer : layers) all_channels += layer.channels;
  double sum = 0.0;
  for (const LayerStatistics& layer : layers) {
    const double divisor = static_cast<double>(layer.channels) * static_cast<double>(layers.size());
    sum += run_layer(layer, average ? static_cast<float>(1.0 / divisor) : 1.0f, gradient, gradient + all_channels);
    gradient += layer.channels;
  }
  *loss = static_cast<float>(sum);
}

}  // namespace gdfq::cpu
