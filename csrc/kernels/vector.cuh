// Several elements in one load or store: 16 bytes where the data is aligned, one element where it is not.
#pragma once

#include <cstdint>

#include "element_type.h"

namespace gdfq::cuda {

template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <class T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

template <class T, int N>
__device__ __forceinline__ void store(T* target, const Vector<T, N>& vector) {
#if defined(__CUDA_ARCH__)
  // Spelled out: of a plain assignment nvcc makes stores of single elements in some kernels.
  if constexpr (sizeof(vector) == 16) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof(bits));
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

}  // namespace gdfq::cuda
