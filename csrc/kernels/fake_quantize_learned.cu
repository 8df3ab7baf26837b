// Activations with a learned step, some of which stay as they are, and the gradients of both in one pass.
//
// Bytes per element (float32): 9 forward, 13 backward, one of them the choice's.
//
// Launch: at most kBlocks blocks walk along the tensor in memory order, 16-byte vectors, several in flight in each
// thread; single elements where the data is not aligned, and at the end. Backward, each block leaves a partial sum for
// the gradient of the step, and a second kernel of a single block adds them in double.
#include "fake_quantize_learned.h"

#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {
namespace {

constexpr std::int64_t kBlocks = 2048;

constexpr int kUnroll = 2;  // vectors of each tensor in flight in each thread

template <class T>
struct Tensors {
  const T* x;
  const T* grad_y;  // backward only
  T* result;        // y, or the gradient of x
  std::int64_t numel;
  LearnedSteps learned;
  Choice choice;
};

// N neighbors, as they are read.
template <class T, int N>
struct Elements {
  Vector<T, N> x;
  Vector<T, N> grad_y;
  Vector<std::uint8_t, N> choice;
};

template <bool backward, int N, class T>
__device__ __forceinline__ Elements<T, N> load_elements(const Tensors<T>& tensors, std::int64_t first) {
  Elements<T, N> elements{};
  elements.x = load<N>(tensors.x + first);
  if constexpr (backward) elements.grad_y = load<N>(tensors.grad_y + first);
  if (tensors.choice.bytes != nullptr) elements.choice = load<N>(tensors.choice.bytes + first);
  return elements;
}

// Writes y, or the gradient of x; gives what the elements add to the gradient of the step.
template <bool backward, int N, class T>
__device__ __forceinline__ float apply(const Tensors<T>& tensors, std::int64_t first, const Elements<T, N>& elements,
                                       const FastStepQuantizer& quantizer) {
  Vector<T, N> result;
  float of_step = 0.0f;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    const float steps = in_steps(to_float(elements.x.at[v]), quantizer);
    const float level = fp32::round_half_even(steps);
    const bool stays = elements.choice.at[v] < tensors.choice.threshold;
    if constexpr (backward) {
      const bool passes = stays || is_inside(level, quantizer);
      result.at[v] = passes ? elements.grad_y.at[v] : from_float<T>(0.0f);
      if (!stays) of_step += to_float(elements.grad_y.at[v]) * slope_of_step(steps, level, quantizer);
    } else {
      const float quantized = dequantize(clamp_level(level, quantizer), quantizer);
      result.at[v] = stays ? elements.x.at[v] : from_float<T>(quantized);
    }
  }
  store(tensors.result + first, result);
  return of_step;
}

template <bool backward, int N, class T>
__global__ void __launch_bounds__(kThreads) learned_kernel(Tensors<T> tensors, float* partial) {
  const FastStepQuantizer quantizer = make_fast(tensors.learned.quantizer());
  const std::int64_t vectors = tensors.numel / N;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float of_step = 0.0f;
  for (std::int64_t first = thread; first < vectors; first += kUnroll * stride) {
    Elements<T, N> elements[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t i = first + u * stride;
      if (i < vectors) elements[u] = load_elements<backward, N>(tensors, i * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t i = first + u * stride;
      if (i < vectors) of_step += apply<backward>(tensors, i * N, elements[u], quantizer);
    }
  }
  const std::int64_t rest = vectors * N + thread;
  if (rest < tensors.numel) {
    of_step += apply<backward>(tensors, rest, load_elements<backward, 1>(tensors, rest), quantizer);
  }
  if constexpr (backward) {
    of_step = block_reduce<Sum>(of_step);
    if (threadIdx.x == 0) partial[blockIdx.x] = of_step;
  }
}

__global__ void __launch_bounds__(kThreads) add_kernel(const float* partial, int blocks, double scale, float* sum) {
  double of_thread = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) of_thread += partial[i];
  const double of_all = block_reduce<Sum>(of_thread);
  if (threadIdx.x == 0) *sum = static_cast<float>(of_all * scale);
}

template <class T>
std::int64_t blocks_for(std::int64_t numel) {
  const std::int64_t blocks = ceil_divide(numel, std::int64_t{kThreads} * kUnroll * kVector<T>);
  return blocks < kBlocks ? blocks : kBlocks;
}

template <bool backward, class T>
void run(const Tensors<T>& tensors, std::int64_t blocks, float* partial, const Device& device) {
  const bool aligned = is_aligned(tensors.x) && is_aligned(tensors.grad_y) && is_aligned(tensors.result) &&
                       is_aligned(tensors.choice.bytes);
  const auto kernel = aligned ? learned_kernel<backward, kVector<T>, T> : learned_kernel<backward, 1, T>;
  GDFQ_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, tensors, partial);
}

}  // namespace

void fake_quantize_learned(const void* x, void* y, ElementType type, std::int64_t numel, const LearnedSteps& learned,
                           const Choice& choice, const Device& device) {
  if (numel == 0) return;
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensors<T> tensors{static_cast<const T*>(x), nullptr, static_cast<T*>(y), numel, learned, choice};
    run<false>(tensors, blocks_for<T>(numel), nullptr, device);
  });
  check_launch("fake_quantize_learned");
}

void fake_quantize_learned_backward(const void* grad_y, const void* x, void* grad_x, float* grad_step, ElementType type,
                                    std::int64_t numel, const LearnedSteps& learned, const Choice& choice, double scale,
                                    const Device& device) {
  float* partial = nullptr;
  std::int64_t blocks = 0;
  if (numel > 0) {
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Tensors<T> tensors{
          static_cast<const T*>(x), static_cast<const T*>(grad_y), static_cast<T*>(grad_x), numel, learned, choice};
      blocks = blocks_for<T>(numel);
      partial = device.scratch(blocks);
      run<true>(tensors, blocks, partial, device);
    });
  }
  GDFQ_LAUNCH(add_kernel, dim3(1), dim3(kThreads), device.stream, partial, static_cast<int>(blocks), scale, grad_step);
  check_launch("fake_quantize_learned_backward");
}

}  // namespace gdfq::cuda
