// One pass over a tensor in which every element meets the parameters of its channel, and sums over each channel.
//
// The tensor is seen as (batch, outer, channels, inner). A group, of which there are batch * channels, is what shares
// parameters and sums: a channel (batch = 1), or a channel of one sample (batch = N). Two launch shapes read whole
// 16-byte vectors wherever the layout lets them:
//
//   planes        inner > 1, NCHW: a block takes one group, or a share of it, and runs along its planes. The parameters
//                 are the same for the whole block. 7 x 7 planes are not made of vectors: there, one element at a time.
//   interleaved   inner = 1, channels_last: a thread keeps to the channels of one vector, whose parameters stay in
//                 registers, and walks down the rows; the threads of a block cover neighbouring vectors and rows, and
//                 make the parameters of its channels once, in shared memory.
//
// Sums take two stages, with no atomics: each block leaves its partial sums, and `sum_of_shares` adds a group's shares
// in a fixed order. How a tensor is divided depends on its shape and alignment alone, so results repeat bit for bit.
#pragma once

#include <initializer_list>

#include "channel_shape.h"
#include "divider.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace gdfq::cuda {

struct GroupedShape {
  std::int64_t batch, outer, channels, inner;

  explicit GroupedShape(const ChannelShape& shape) : GroupedShape(1, shape.outer, shape.channels, shape.inner) {}
  GroupedShape(std::int64_t batch, std::int64_t outer, std::int64_t channels, std::int64_t inner)
      : batch(batch), outer(outer), channels(channels), inner(inner) {}

  std::int64_t groups() const { return batch * channels; }
  std::int64_t numel() const { return batch * outer * channels * inner; }
};

// What an operation on elements is made of. `T` is the type of the tensors; derived classes add
//   void prepare()                                                   parameters of all groups; may be left out
//   Group group(int64 g) const                                       the parameters of a group
//   float operator()(const float (&in)[kInputs], const Group&, float (&sums)[kSums]) const
template <class Element, int inputs, int sums, bool has_output>
struct ChannelOperation {
  using T = Element;
  static constexpr int kInputs = inputs;
  static constexpr int kSums = sums;
  static constexpr int kAccumulators = sums > 0 ? sums : 1;
  static constexpr bool kHasOutput = has_output;

  const T* input[inputs];
  T* output;
  float* partial;  // [sum][group][share]

  __device__ void prepare() {}
};

// The shares' partial sums, as the second stage reads them.
struct Partial {
  const float* sums;
  std::int64_t groups;
  int shares;
};

// One group's sum k over all shares, in every lane of the calling warp. In double, because a variance is the difference
// of two such sums.
__device__ __forceinline__ double sum_of_shares(const Partial& partial, int k, std::int64_t group) {
  const float* shares = partial.sums + (k * partial.groups + group) * partial.shares;
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < partial.shares; i += kWarp) sum += shares[i];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// The group that a warp of a second stage finishes; the grid may be a little larger than needed.
__device__ __forceinline__ std::int64_t group_of_warp() {
  return (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

inline dim3 grid_of_warps(std::int64_t groups) {
  return dim3(static_cast<unsigned>(ceil_divide(groups, kThreads / kWarp)));
}

// Loads in flight in each thread. Two inputs fill the registers twice as fast.
template <class Operation, int N>
constexpr int kUnroll = (N == 1 ? 8 : 4) / Operation::kInputs;

template <class Operation, int N>
__device__ __forceinline__ void apply(const Operation& operation, std::int64_t offset,
                                      const Vector<typename Operation::T, N> (&in)[Operation::kInputs],
                                      const typename Operation::Group (&groups)[N],
                                      float (&sums)[N][Operation::kAccumulators]) {
  using T = typename Operation::T;
  Vector<T, N> out;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    float values[Operation::kInputs];
#pragma unroll
    for (int k = 0; k < Operation::kInputs; ++k) values[k] = to_float(in[k].at[v]);
    const float result = operation(values, groups[v], sums[v]);
    if constexpr (Operation::kHasOutput) out.at[v] = from_float<T>(result);
  }
  if constexpr (Operation::kHasOutput) store(operation.output + offset, out);
}

// ---- planes

struct Planes {
  std::int64_t channels, inner, outer_stride, batch_stride;  // elements
  std::int64_t vectors, vectors_of_plane, vectors_of_share;  // the first two of a group
  Divider plane;                                             // by vectors_of_plane
};

// Vectors that a thread counts in 32 bits.
constexpr std::int64_t kMaxShare = std::int64_t{1} << 30;

template <class Operation, int N>
__global__ void __launch_bounds__(kThreads, 2) planes_kernel(Operation operation, Planes planes) {
  using T = typename Operation::T;
  constexpr int unroll = kUnroll<Operation, N>;
  const std::int64_t group = blockIdx.x;
  operation.prepare();
  const typename Operation::Group parameters = operation.group(group);
  typename Operation::Group groups[N];
  float sums[N][Operation::kAccumulators] = {};
#pragma unroll
  for (int v = 0; v < N; ++v) groups[v] = parameters;

  // The share begins somewhere in a plane: 32 bits count from there, or from the beginning of that plane if the share
  // goes on in the next one.
  const std::int64_t begin = blockIdx.y * planes.vectors_of_share;
  const std::int64_t rest = planes.vectors - begin;
  const auto count = static_cast<std::uint32_t>(rest < planes.vectors_of_share ? rest : planes.vectors_of_share);
  const std::int64_t first_plane = begin / planes.vectors_of_plane;
  const std::int64_t into_plane = begin - first_plane * planes.vectors_of_plane;
  const bool in_one_plane = into_plane + count <= planes.vectors_of_plane;
  const auto start = in_one_plane ? 0u : static_cast<std::uint32_t>(into_plane);
  const std::uint32_t end = start + count;
  const std::int64_t base = group / planes.channels * planes.batch_stride + group % planes.channels * planes.inner +
                            first_plane * planes.outer_stride + (in_one_plane ? into_plane * N : 0);
  for (std::uint32_t first = start + threadIdx.x; first < end; first += unroll * blockDim.x) {
    Vector<T, N> in[unroll][Operation::kInputs];
    std::int64_t offset[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const std::uint32_t i = first + u * blockDim.x;
      const std::uint32_t plane = planes.plane.quotient(i);
      offset[u] = base + static_cast<std::int64_t>(plane) * planes.outer_stride +
                  static_cast<std::int64_t>(i - plane * planes.plane.divisor) * N;
#pragma unroll
      for (int k = 0; k < Operation::kInputs; ++k) {
        if (i < end) in[u][k] = load<N>(operation.input[k] + offset[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (first + u * blockDim.x < end) apply<Operation, N>(operation, offset[u], in[u], groups, sums);
    }
  }

  if constexpr (Operation::kSums > 0) {
#pragma unroll
    for (int k = 0; k < Operation::kSums; ++k) {
      float sum = sums[0][k];
#pragma unroll
      for (int v = 1; v < N; ++v) sum += sums[v][k];
      sum = block_reduce<Sum>(sum);
      if (threadIdx.x == 0) operation.partial[(k * std::int64_t{gridDim.x} + group) * gridDim.y + blockIdx.y] = sum;
    }
  }
}

// ---- interleaved

struct Interleaved {
  std::int64_t channels, rows, rows_of_share, tiles;
  int columns;  // vectors side by side in a block
};

template <class Operation, int N>
__global__ void GDFQ_LAUNCH_BOUNDS(2) interleaved_kernel(Operation operation, Interleaved shape) {
  using T = typename Operation::T;
  constexpr int unroll = kUnroll<Operation, N>;
  const int column = static_cast<int>(threadIdx.x) % shape.columns;
  const int block_row = static_cast<int>(threadIdx.x) / shape.columns;
  const int block_rows = static_cast<int>(blockDim.x) / shape.columns;
  const std::int64_t sample = blockIdx.x / shape.tiles;
  const std::int64_t first_channel = blockIdx.x % shape.tiles * shape.columns * N;
  const std::int64_t channel = first_channel + column * N;
  const bool is_inside = channel < shape.channels && block_row < block_rows;
  float sums[N][Operation::kAccumulators] = {};

  operation.prepare();
  __shared__ typename Operation::Group of_channel[kWarp * N];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < shape.columns * N; i += static_cast<int>(blockDim.x)) {
    const std::int64_t c = first_channel + i;
    if (c < shape.channels) of_channel[i] = operation.group(sample * shape.channels + c);
  }
  __syncthreads();

  if (is_inside) {
    typename Operation::Group groups[N];
#pragma unroll
    for (int v = 0; v < N; ++v) groups[v] = of_channel[column * N + v];
    const std::int64_t base = sample * shape.rows * shape.channels + channel;
    const std::int64_t begin = blockIdx.y * shape.rows_of_share;
    const std::int64_t share_end = begin + shape.rows_of_share;
    const std::int64_t end = share_end < shape.rows ? share_end : shape.rows;
    for (std::int64_t first = begin + block_row; first < end; first += unroll * block_rows) {
      Vector<T, N> in[unroll][Operation::kInputs];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const std::int64_t row = first + u * block_rows;
#pragma unroll
        for (int k = 0; k < Operation::kInputs; ++k) {
          if (row < end) in[u][k] = load<N>(operation.input[k] + base + row * shape.channels);
        }
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const std::int64_t row = first + u * block_rows;
        if (row < end) apply<Operation, N>(operation, base + row * shape.channels, in[u], groups, sums);
      }
    }
  }

  if constexpr (Operation::kSums > 0) {
    __shared__ float of_thread[N][kThreads];
    const std::int64_t all_groups = static_cast<std::int64_t>(gridDim.x / shape.tiles) * shape.channels;
#pragma unroll
    for (int k = 0; k < Operation::kSums; ++k) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < N; ++v) of_thread[v][threadIdx.x] = sums[v][k];
      __syncthreads();
      // The threads of the block's first rows add one channel each, down the rows.
      for (int i = static_cast<int>(threadIdx.x); i < shape.columns * N; i += static_cast<int>(blockDim.x)) {
        const std::int64_t c = first_channel + i;
        if (c >= shape.channels) continue;
        float sum = 0.0f;
        for (int row = 0; row < block_rows; ++row) sum += of_thread[i % N][row * shape.columns + i / N];
        operation.partial[(k * all_groups + sample * shape.channels + c) * gridDim.y + blockIdx.y] = sum;
      }
    }
  }
}

// ---- how a tensor is divided

// Enough blocks to fill the largest GPUs several times over, and where sums are taken, each with enough to do that its
// partial sums weigh little.
constexpr std::int64_t kBlocks = 4096;
constexpr std::int64_t kSummingBlocks = 2048;

template <class Operation, int N>
constexpr std::int64_t kRowsOfThread = Operation::kSums > 0 ? 8 : kUnroll<Operation, N>;

template <class Operation>
Operation with_scratch(Operation operation, std::int64_t groups, std::int64_t shares, const Device& device) {
  if (Operation::kSums > 0) operation.partial = device.scratch(Operation::kSums * groups * shares);
  return operation;
}

template <class Operation, int N>
Partial run_planes(const Operation& operation, const GroupedShape& shape, const Device& device) {
  const std::int64_t groups = shape.groups();
  const std::int64_t vectors = shape.outer * shape.inner / N;
  const std::int64_t blocks = Operation::kSums > 0 ? kSummingBlocks : kBlocks;
  const std::int64_t of_thread = kUnroll<Operation, N>;
  const std::int64_t warps = ceil_divide(vectors, of_thread * kWarp);
  const std::int64_t threads = warps * kWarp < kThreads ? warps * kWarp : kThreads;
  const std::int64_t at_least = of_thread * threads;
  const std::int64_t vectors_of_plane = shape.inner / N;
  if (vectors_of_plane > kMaxShare && shape.outer > 1) throw std::runtime_error("planes of over 2^30 vectors");
  std::int64_t shares = ceil_divide(blocks, groups);
  shares = shares < ceil_divide(vectors, at_least) ? shares : ceil_divide(vectors, at_least);
  shares = shares * kMaxShare > vectors ? shares : ceil_divide(vectors, kMaxShare / 2);
  const std::int64_t vectors_of_share = ceil_divide(ceil_divide(vectors, shares), at_least) * at_least;
  shares = ceil_divide(vectors, vectors_of_share);
  const Operation ready = with_scratch(operation, groups, shares, device);
  const Planes planes{shape.channels,
                      shape.inner,
                      shape.channels * shape.inner,
                      shape.outer * shape.channels * shape.inner,
                      vectors,
                      vectors_of_plane,
                      vectors_of_share,
                      Divider(vectors_of_plane < kMaxShare ? vectors_of_plane : kMaxShare)};
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(shares));
  GDFQ_LAUNCH((planes_kernel<Operation, N>), grid, dim3(static_cast<unsigned>(threads)), device.stream, ready, planes);
  return {ready.partial, groups, static_cast<int>(shares)};
}

template <class Operation, int N>
Partial run_interleaved(const Operation& operation, const GroupedShape& shape, const Device& device) {
  const std::int64_t vectors = shape.channels / N;
  const std::int64_t tiles = ceil_divide(vectors, kWarp);
  const std::int64_t columns = ceil_divide(vectors, tiles);
  std::int64_t block_rows = kThreads / columns;
  block_rows = block_rows < shape.outer ? block_rows : shape.outer;
  const std::int64_t threads = ceil_divide(columns * block_rows, kWarp) * kWarp;
  const std::int64_t blocks = Operation::kSums > 0 ? kSummingBlocks : kBlocks;
  const std::int64_t at_least = kRowsOfThread<Operation, N> * (threads / columns);
  std::int64_t shares = ceil_divide(blocks, tiles * shape.batch);
  shares = shares < ceil_divide(shape.outer, at_least) ? shares : ceil_divide(shape.outer, at_least);
  const std::int64_t rows_of_share = ceil_divide(ceil_divide(shape.outer, shares), at_least) * at_least;
  shares = ceil_divide(shape.outer, rows_of_share);
  const Operation ready = with_scratch(operation, shape.groups(), shares, device);
  const Interleaved interleaved{shape.channels, shape.outer, rows_of_share, tiles, static_cast<int>(columns)};
  const dim3 grid(static_cast<unsigned>(tiles * shape.batch), static_cast<unsigned>(shares));
  GDFQ_LAUNCH((interleaved_kernel<Operation, N>), grid, dim3(static_cast<unsigned>(threads)), device.stream, ready,
              interleaved);
  return {ready.partial, shape.groups(), static_cast<int>(shares)};
}

// Runs `operation` over a tensor that is not empty.
template <class Operation>
Partial run(const Operation& operation, const GroupedShape& shape, const Device& device) {
  constexpr int N = kVector<typename Operation::T>;
  bool aligned = !Operation::kHasOutput || is_aligned(operation.output);
  for (const auto* input : operation.input) aligned = aligned && is_aligned(input);
  if (shape.inner == 1) {
    if (aligned && shape.channels % N == 0) return run_interleaved<Operation, N>(operation, shape, device);
    return run_interleaved<Operation, 1>(operation, shape, device);
  }
  if (aligned && shape.inner % N == 0) return run_planes<Operation, N>(operation, shape, device);
  return run_planes<Operation, 1>(operation, shape, device);
}

// Runs Operation<T> for the type T of the tensors; `set` gives it its parameters. An empty tensor has no shares.
template <template <class> class Operation, class Set>
Partial for_each_channel(ElementType type, std::initializer_list<const void*> inputs, void* output,
                         const GroupedShape& shape, const Device& device, const Set& set) {
  Partial partial{nullptr, shape.groups(), 0};
  if (shape.numel() == 0) return partial;
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Operation<T> operation;
    int k = 0;
    for (const void* input : inputs) operation.input[k++] = static_cast<const T*>(input);
    operation.output = static_cast<T*>(output);
    set(operation);
    partial = run(operation, shape, device);
  });
  return partial;
}

}  // namespace gdfq::cuda
