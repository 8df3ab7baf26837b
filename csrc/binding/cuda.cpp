// The CUDA kernels as PyTorch operators, on the device of the input and on its current stream.
#include "cuda.h"

#include <torch/csrc/stable/accelerator.h>

// Only a CUDA build of PyTorch has it; weak, so that one library loads with all.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace gdfq::binding {
namespace {

class Cuda : public CudaCall {
 public:
  explicit Cuda(const Tensor& x) : CudaCall(x, current_stream(x)), guard_(x.get_device_index()) {}

 private:
  static cudaStream_t current_stream(const Tensor& x) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gdfq_ext, CUDA, library) { register_operators<Cuda>(library); }

}  // namespace gdfq::binding
