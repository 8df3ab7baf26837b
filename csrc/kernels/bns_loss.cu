// Eq. 5 over all layers, |mean - running_mean|^2 + |var - running_var|^2, with its gradient.
//
// A few thousand numbers: not bytes but launches are what it costs. One block takes one layer and leaves its term, a
// second kernel of one warp adds the terms in order. The layers' addresses travel as the kernel's argument, kLayers of
// them in a launch.
#include "bns_loss.h"

#include "reduce.cuh"

namespace gdfq::cuda {
namespace {

constexpr int kLayers = 64;

struct Layer {
  LayerStatistics statistics;
  std::int64_t offset;  // of its first channel among all
  float factor;
};

struct Layers {
  Layer at[kLayers];
};
static_assert(sizeof(Layers) < kMaxArguments - 64);  // besides the others

__global__ void __launch_bounds__(kThreads)
    layers_kernel(const Layers layers, std::int64_t all_channels, float* terms, float* gradient) {
  const Layer& layer = layers.at[blockIdx.x];
  const LayerStatistics& statistics = layer.statistics;
  float sum = 0.0f;
  for (std::int64_t c = threadIdx.x; c < statistics.channels; c += kThreads) {
    const float mean = statistics.mean[c] - statistics.running_mean[c];
    const float variance = statistics.variance[c] - statistics.running_var[c];
    sum += layer.factor * mean * mean + layer.factor * variance * variance;
    gradient[layer.offset + c] = 2.0f * (layer.factor * mean);
    gradient[all_channels + layer.offset + c] = 2.0f * (layer.factor * variance);
  }
  sum = block_reduce<Sum>(sum);
  if (threadIdx.x == 0) terms[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kWarp) add_kernel(const float* terms, int count, float* loss) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kWarp) sum += terms[i];
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x == 0) *loss = sum;
}

}  // namespace

void bns_loss(const std::vector<LayerStatistics>& layers, bool average, float* loss, float* gradient,
              const Device& device) {
  std::int64_t all_channels = 0;
  for (const LayerStatistics& layer : layers) all_channels += layer.channels;
  float* terms = device.scratch(static_cast<std::int64_t>(layers.size()));
  Layers batch;
  unsigned count = 0;
  std::int64_t offset = 0;
  float* batch_terms = terms;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const double divisor = static_cast<double>(layers[i].channels) * static_cast<double>(layers.size());
    batch.at[count++] = {layers[i], offset, average ? static_cast<float>(1.0 / divisor) : 1.0f};
    offset += layers[i].channels;
    if (count == kLayers || i + 1 == layers.size()) {
      GDFQ_LAUNCH(layers_kernel, dim3(count), dim3(kThreads), device.stream, batch, all_channels, batch_terms,
                  gradient);
      batch_terms += count;
      count = 0;
    }
  }
  GDFQ_LAUNCH(add_kernel, dim3(1), dim3(kWarp), device.stream, terms, static_cast<int>(layers.size()), loss);
  check_launch("bns_loss");
}

}  // namespace gdfq::cuda
