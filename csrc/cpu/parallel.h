// How a kernel runs its blocks on threads: the caller lends a thread pool (PyTorch's, in the binding), so that these
// kernels need no threading library. Blocks are fixed by the tensor's size alone and each owns its outputs: the number
// of threads never changes a result.
#pragma once

#include <cstdint>

namespace gdfq::cpu {

struct Parallel {
  using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
  // Calls body(begin, end, context) for ranges that together cover [0, count) once, and returns when all have ended.
  void (*run)(std::int64_t count, Body body, void* context);
};

// On the thread that calls.
inline constexpr Parallel kSerial{
    [](std::int64_t count, Parallel::Body body, void* context) { body(0, count, context); }};

template <class F>
void parallel_for(const Parallel& parallel, std::int64_t count, const F& body) {
  if (count == 0) return;
  const auto call = [](std::int64_t begin, std::int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  parallel.run(count, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace gdfq::cpu
