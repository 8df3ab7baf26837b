// The CUDA kernels, run on the CPU, as operators of their own: the same binding, on a stream that only the emulation
// has.
#include <algorithm>
#include <limits>
#include <utility>

#include "../../csrc/binding/cuda.h"

namespace gdfq::binding {
namespace {

class Emulated : public CudaCall {
 public:
  explicit Emulated(const Tensor& x) : CudaCall(x, emu::call_stream()) {}

  // Whatever a kernel reads before it writes becomes NaN. Where not all blocks run it stays 0, which is what the tests
  // give the others to see.
  cuda::Device device() {
    cuda::Device device = CudaCall::device();
    lend_ = device.lend;
    device.lend = [](std::int64_t count, void* owner) {
      float* floats = lend_(count, owner);
      if (emu::most_blocks() == ~0u) std::fill_n(floats, count, std::numeric_limits<float>::quiet_NaN());
      return floats;
    };
    return device;
  }

 private:
  static inline float* (*lend_)(std::int64_t, void*) = nullptr;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gdfq_cuda_on_cpu, CPU, library) { register_operators<Emulated>(library); }

}  // namespace gdfq::binding

extern "C" __attribute__((visibility("default"))) void gdfq_set_seed(unsigned seed) { emu::seed() = seed; }

extern "C" __attribute__((visibility("default"))) void gdfq_set_most_blocks(unsigned most) {
  emu::most_blocks() = most;
}

extern "C" __attribute__((visibility("default"))) emu::Launched gdfq_take_launched() {
  return std::exchange(emu::launched(), {});
}
