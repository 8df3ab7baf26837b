// The CUDA kernels, run on the CPU, as operators of their own: the same binding, without a stream.
#include <limits>

#include "../../csrc/binding/cuda.h"

namespace gdfq::binding {
namespace {

class Emulated : public CudaCall {
 public:
  explicit Emulated(const Tensor& x) : CudaCall(x, nullptr) {}

  // Whatever a kernel reads before it writes becomes NaN.
  cuda::Device device() {
    cuda::Device device = CudaCall::device();
    lend_ = device.lend;
    device.lend = [](std::int64_t count, void* owner) {
      float* floats = lend_(count, owner);
      for (std::int64_t i = 0; i < count; ++i) floats[i] = std::numeric_limits<float>::quiet_NaN();
      return floats;
    };
    return device;
  }

 private:
  static inline float* (*lend_)(std::int64_t, void*) = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gdfq_cuda_on_cpu, CPU, library) {
  register_operators<Emulated>(library);
  register_gpu_operators<Emulated>(library);
}

}  // namespace gdfq::binding

extern "C" __attribute__((visibility("default"))) void gdfq_set_seed(unsigned seed) { emu::seed() = seed; }
