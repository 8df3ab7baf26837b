// Where CUDA kernels run, as the host functions that launch them are told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gdfq::cuda {

struct Device {
  cudaStream_t stream;
  // Lends uninitialised floats that no other stream touches before what is on this one has ended.
  float* (*lend)(std::int64_t count, void* owner);
  void* owner;

  float* scratch(std::int64_t count) const { return lend(count, owner); }
};

}  // namespace gdfq::cuda
