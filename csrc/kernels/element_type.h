// The element types that the kernels read and write, and the switches from a value to a template argument.
#pragma once

#include <type_traits>

#include "float16.h"
#include "quantizer.h"

namespace gdfq {

enum class ElementType { kFloat32, kFloat16, kBFloat16 };

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>()) with the C++ type of the elements.
template <class F>
void with_type(ElementType type, const F& f) {
  switch (type) {
    case ElementType::kFloat32:
      return f(TypeTag<float>());
    case ElementType::kFloat16:
      return f(TypeTag<Half>());
    case ElementType::kBFloat16:
      return f(TypeTag<BFloat16>());
  }
}

template <class F>
void with_bool(bool value, const F& f) {
  if (value) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

}  // namespace gdfq
