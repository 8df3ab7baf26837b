// The CPU kernels as PyTorch operators, on PyTorch's threads.
#include "../cpu/parallel.h"
#include "operators.h"

namespace gdfq::binding {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  static void run_on_torch_threads(std::int64_t count, cpu::Parallel::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, /*grain_size=*/1, body, context));
  }

  cpu::Parallel device() const { return {run_on_torch_threads}; }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gdfq_ext, CPU, library) { register_operators<Cpu>(library); }

}  // namespace gdfq::binding
