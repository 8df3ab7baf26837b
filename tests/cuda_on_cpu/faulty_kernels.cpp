// Launches and kernels as no GPU would take them, for test_emulation.py.
#include "../../csrc/kernels/launch.cuh"
#include "../../csrc/kernels/vector.cuh"

namespace gdfq::cuda {
namespace {

#if defined(TOO_MUCH_SHARED_MEMORY)
__global__ void shared_kernel(float* x) {
  __shared__ float values[48 * 256 + 1];
  values[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = values[threadIdx.x];
}
#endif

__global__ void set_kernel(float* x, int offset) { x[offset + static_cast<int>(blockIdx.x + threadIdx.x)] = 1.0f; }

__global__ void copy_kernel(const float* x, float* y, int offset) { store(y, load<4>(x + offset)); }

__global__ void index_kernel(float* x) {
  float values[4] = {};
  values[threadIdx.x] = x[0];
  x[threadIdx.x] = values[threadIdx.x];
}

struct Launch {
  dim3 grid = 1;
  dim3 block = 1;
  cudaStream_t stream = emu::call_stream();
  int offset = 0;
};

}  // namespace
}  // namespace gdfq::cuda

// Returns what went wrong, or nothing. x has room for 1000 floats.
extern "C" __attribute__((visibility("default"))) const char* gdfq_try(const char* what, float* x) {
  using namespace gdfq::cuda;
  static std::string error;
  error.clear();
  const std::string name = what;
  Launch launch;
  if (name == "grid") launch.grid = dim3(1, 65536);
  if (name == "block") launch.block = dim3(1025);
  if (name == "flat block") launch.block = dim3(1, 1, 65);
  if (name == "stream") launch.stream = nullptr;
  if (name == "doubled") launch.grid = dim3(2, 1, 2);
  if (name == "behind") launch.offset = 1000;
  if (name == "far before") launch.offset = -600;
  if (name == "beside") launch.offset = -1;
  try {
    if (name == "unaligned") {
      GDFQ_LAUNCH(copy_kernel, launch.grid, launch.block, launch.stream, x, x + 8, 1);
    } else if (name == "index") {
      GDFQ_LAUNCH(index_kernel, launch.grid, dim3(5), launch.stream, x);
    } else {
      GDFQ_LAUNCH(set_kernel, launch.grid, launch.block, launch.stream, x, launch.offset);
    }
#if defined(TOO_MUCH_SHARED_MEMORY)
    GDFQ_LAUNCH(shared_kernel, launch.grid, launch.block, launch.stream, x);
#endif
    check_launch("gdfq_try");
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return error.c_str();
}
