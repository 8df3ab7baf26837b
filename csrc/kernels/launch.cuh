// Launching, in one place: the macro is what the tests replace to run kernels without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

#ifndef GDFQ_LAUNCH
#define GDFQ_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif

// Launch bounds of a kernel for which ptxas, left alone, aims at more blocks of a multiprocessor than registers allow,
// and spills: so it does for compute capability 12.0, and not for the others.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define GDFQ_LAUNCH_BOUNDS(blocks) __launch_bounds__(kThreads, blocks)
#else
#define GDFQ_LAUNCH_BOUNDS(blocks) __launch_bounds__(kThreads)
#endif

namespace gdfq::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;                // of a block, at most
constexpr std::size_t kMaxArguments = 4096;  // bytes that every driver takes as a kernel's arguments

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline void check_launch(const char* operation) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
}

}  // namespace gdfq::cuda
