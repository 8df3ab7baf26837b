// How an operator's header declares its host function: once, for the CPU and for CUDA.
#pragma once

namespace gdfq {

namespace cpu {
struct Parallel;
}
namespace cuda {
struct Device;
}

// `gdfq::cpu::name` and `gdfq::cuda::name`. The parameter besides those given says on which threads or on which stream
// it runs.
#define GDFQ_KERNEL(name, ...)                      \
  namespace cpu {                                   \
  void name(__VA_ARGS__, const Parallel& parallel); \
  }                                                 \
  namespace cuda {                                  \
  void name(__VA_ARGS__, const Device& device);     \
  }

}  // namespace gdfq
