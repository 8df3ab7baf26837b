// The minimum and the maximum of a tensor, into an exponential moving average that corrects its own bias:
//   average <- m * average + (1 - m) * new,  weight <- m * weight + (1 - m),  result = average / weight.
//
// Bytes per element (float32): 4.
//
// Launch: at most kBlocks blocks read the tensor in turns, 16-byte vectors, several in flight in each thread, and leave
// one pair each; a second kernel of a single block joins the pairs and updates the state. Two launches instead of a
// counter that the last block would read: nothing is left over that a replayed graph would have to reset.
#include "observe_range.h"

#include "quantizer.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {
namespace {

constexpr std::int64_t kBlocks = 1024;
constexpr int kUnroll = 4;

struct Bounds {
  float lower;
  float upper;

  __device__ static Bounds nothing() { return {Least::nothing(), Greatest::nothing()}; }

  __device__ void include(float low, float high) {
    lower = Least::join(lower, low);
    upper = Greatest::join(upper, high);
  }

  // Of the block; all its threads call.
  __device__ Bounds of_block() const { return {block_reduce<Least>(lower), block_reduce<Greatest>(upper)}; }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads) bounds_kernel(const T* x, std::int64_t numel, float* partial) {
  Bounds bounds = Bounds::nothing();
  const std::int64_t vectors = numel / N;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t first = thread; first < vectors; first += kUnroll * stride) {
    Vector<T, N> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t i = first + u * stride;
      in[u] = load<N>(x + (i < vectors ? i : first) * N);  // the first one again changes nothing
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int v = 0; v < N; ++v) bounds.include(to_float(in[u].at[v]), to_float(in[u].at[v]));
    }
  }
  const std::int64_t rest = vectors * N + thread;
  if (rest < numel) bounds.include(to_float(x[rest]), to_float(x[rest]));
  bounds = bounds.of_block();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = bounds.lower;
    partial[gridDim.x + blockIdx.x] = bounds.upper;
  }
}

__global__ void __launch_bounds__(kThreads)
    update_kernel(const float* partial, int blocks, float* state, float* average, float keep, float rest) {
  Bounds bounds = Bounds::nothing();
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) {
    bounds.include(partial[i], partial[blocks + i]);
  }
  bounds = bounds.of_block();
  if (threadIdx.x != 0) return;
  float weight = state[2];
  float lower = state[0];
  float upper = state[1];
  if (blocks > 0) {
    lower = fp32::add(fp32::multiply(keep, lower), fp32::multiply(rest, bounds.lower));
    upper = fp32::add(fp32::multiply(keep, upper), fp32::multiply(rest, bounds.upper));
    weight = fp32::add(fp32::multiply(keep, weight), rest);
    state[0] = lower;
    state[1] = upper;
    state[2] = weight;
  }
  average[0] = fp32::divide(lower, weight);
  average[1] = fp32::divide(upper, weight);
}

template <class T, int N>
void launch_bounds_kernel(const T* x, std::int64_t numel, std::int64_t blocks, float* partial, const Device& device) {
  GDFQ_LAUNCH((bounds_kernel<T, N>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, x, numel,
              partial);
}

}  // namespace

void observe_range(const void* x, float* state, float* average, ElementType type, std::int64_t numel, double momentum,
                   const Device& device) {
  float* partial = nullptr;
  std::int64_t blocks = 0;
  if (numel > 0) {
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      constexpr int N = kVector<T>;
      blocks = ceil_divide(numel, std::int64_t{kThreads} * kUnroll * N);
      blocks = blocks < kBlocks ? blocks : kBlocks;
      partial = device.scratch(2 * blocks);
      const auto run = is_aligned(x) ? launch_bounds_kernel<T, N> : launch_bounds_kernel<T, 1>;
      run(static_cast<const T*>(x), numel, blocks, partial, device);
    });
  }
  const float keep = static_cast<float>(momentum);
  const float rest = static_cast<float>(1.0 - momentum);
  GDFQ_LAUNCH(update_kernel, dim3(1), dim3(kThreads), device.stream, partial, static_cast<int>(blocks), state, average,
              keep, rest);
  check_launch("observe_range");
}

}  // namespace gdfq::cuda
