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
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

}  // namespace gdfq::cuda
