// Eq. 6 for weights: each output channel between its own minimum and maximum, all layers in one launch.
//
// Bytes per element (float32): 8. A channel is read twice, the second time from the cache.
//
// Launch: the layers' addresses travel as the kernel's argument, kLayers of them (more layers, more launches). A block
// finds its layer by bisection, and takes one channel where channels are long, eight, one to a warp, where they are
// short: depthwise layers have nine elements in each.
#include "fake_quantize_weight.h"

#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {
namespace {

constexpr int kLayers = 64;
constexpr std::int64_t kShort = 1024;

struct Layer {
  const void* values;
  void* quantized;
  std::int64_t channels;
  std::int64_t length;
  std::int64_t first_block;
  ElementType type;
  int bits;
  bool aligned;
};

struct Layers {
  Layer at[kLayers];
  int count;
};
static_assert(sizeof(Layers) <= kMaxArguments);

// The threads that share a channel: a warp or the block.
struct Team {
  int rank;
  int size;

  template <class Operation>
  __device__ float reduce(float value) const {
    return size == kWarp ? warp_reduce<Operation>(value) : block_reduce<Operation>(value);
  }
};

template <class T, int N>
__device__ void quantize_channel(const T* x, T* y, std::int64_t length, int bits, Team team) {
  float lower = Least::nothing();
  float upper = Greatest::nothing();
#pragma unroll 4
  for (std::int64_t i = team.rank * N; i < length; i += team.size * N) {
    const Vector<T, N> in = load<N>(x + i);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      lower = Least::join(lower, to_float(in.at[v]));
      upper = Greatest::join(upper, to_float(in.at[v]));
    }
  }
  lower = team.reduce<Least>(lower);
  upper = team.reduce<Greatest>(upper);
  const Quantizer quantizer = make_quantizer(lower, upper, bits);
#pragma unroll 4
  for (std::int64_t i = team.rank * N; i < length; i += team.size * N) {
    const Vector<T, N> in = load<N>(x + i);
    Vector<T, N> out;
#pragma unroll
    for (int v = 0; v < N; ++v) out.at[v] = from_float<T>(fake_quantize(to_float(in.at[v]), quantizer));
    store(y + i, out);
  }
}

template <class T>
__device__ void quantize_layer(const Layer& layer, std::int64_t channel, Team team) {
  const T* x = static_cast<const T*>(layer.values) + channel * layer.length;
  T* y = static_cast<T*>(layer.quantized) + channel * layer.length;
  if (layer.aligned) {
    quantize_channel<T, kVector<T>>(x, y, layer.length, layer.bits, team);
  } else {
    quantize_channel<T, 1>(x, y, layer.length, layer.bits, team);
  }
}

__global__ void __launch_bounds__(kThreads) weights_kernel(const Layers layers) {
  const std::int64_t block = blockIdx.x;
  int low = 0;
  for (int high = layers.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (block < layers.at[middle].first_block) {
      high = middle;
    } else {
      low = middle;
    }
  }
  const Layer& layer = layers.at[low];
  const bool by_warp = layer.length <= kShort;
  const Team team = by_warp ? Team{static_cast<int>(threadIdx.x) % kWarp, kWarp}
                            : Team{static_cast<int>(threadIdx.x), kThreads};
  const std::int64_t channel = by_warp ? (block - layer.first_block) * (kThreads / kWarp) + threadIdx.x / kWarp
                                       : block - layer.first_block;
  if (channel >= layer.channels) return;  // of short channels only, a whole warp
  switch (layer.type) {
    case ElementType::kFloat32:
      return quantize_layer<float>(layer, channel, team);
    case ElementType::kFloat16:
      return quantize_layer<Half>(layer, channel, team);
    case ElementType::kBFloat16:
      return quantize_layer<BFloat16>(layer, channel, team);
  }
}

std::int64_t size_of(ElementType type) {
  std::int64_t size = 0;
  with_type(type, [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
  return size;
}

}  // namespace

void fake_quantize_weights(const std::vector<Weight>& weights, const Device& device) {
  Layers layers;
  layers.count = 0;
  std::int64_t blocks = 0;
  const auto launch = [&] {
    if (layers.count == 0) return;
    GDFQ_LAUNCH(weights_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, layers);
    layers.count = 0;
    blocks = 0;
  };
  for (const Weight& weight : weights) {
    if (weight.channels == 0 || weight.length == 0) continue;
    const bool aligned = is_aligned(weight.values) && is_aligned(weight.quantized) &&
                         weight.length * size_of(weight.type) % 16 == 0;
    layers.at[layers.count++] = {weight.values, weight.quantized, weight.channels, weight.length,
                                 blocks,        weight.type,      weight.bits,     aligned};
    blocks += weight.length <= kShort ? ceil_divide(weight.channels, kThreads / kWarp) : weight.channels;
    if (layers.count == kLayers) launch();
  }
  launch();
  check_launch("fake_quantize_weights");
}

}  // namespace gdfq::cuda
