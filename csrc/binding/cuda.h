// The CUDA kernels, as operators.h wants the kernels of a device.
#pragma once

#include <deque>

#include "../kernels/device.h"
#include "operators.h"

namespace gdfq::binding {

// One call: its stream, and its scratch memory, which PyTorch's allocator takes back when the call ends and gives to
// nobody before the stream is past it.
class CudaCall {
 public:
  CudaCall(const Tensor& like, cudaStream_t stream) : like_(like), stream_(stream) {}
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  cuda::Device device() { return {stream_, &lend, this}; }

 private:
  static float* lend(std::int64_t count, void* owner) {
    auto* call = static_cast<CudaCall*>(owner);
    return floats(call->scratch_.emplace_back(empty_floats(call->like_, count)));
  }

  const Tensor& like_;
  cudaStream_t stream_;
  std::deque<Tensor> scratch_;
};

}  // namespace gdfq::binding
