// Reductions over a warp and a block, in an order that the launch shape alone decides.
#pragma once

#include <cmath>

#include "launch.cuh"

namespace gdfq::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  static __device__ float nothing() { return 0.0f; }
  template <class T>
  static __device__ T join(T a, T b) {
    return a + b;
  }
};

// Least and greatest are NaN if any value is: fminf and fmaxf would swallow it.
struct Least {
  static __device__ float nothing() { return INFINITY; }
  static __device__ float join(float a, float b) { return (b < a || b != b) ? b : a; }
};

struct Greatest {
  static __device__ float nothing() { return -INFINITY; }
  static __device__ float join(float a, float b) { return (b > a || b != b) ? b : a; }
};

// All lanes of the warp call, all get the result.
template <class Operation, class T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = Operation::join(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// All threads of the block call, all get the result. Blocks are whole warps.
template <class Operation, class T>
__device__ T block_reduce(T value) {
  __shared__ T of_warp[kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_reduce<Operation>(value);
  __syncthreads();  // an earlier result may still be being read
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  return warp_reduce<Operation>(lane < warps ? of_warp[lane] : static_cast<T>(Operation::nothing()));
}

}  // namespace gdfq::cuda
