// How this build was made, for bug reports and `gdfq doctor`. No dates and no paths: the same sources, compiler and
// flags give the same file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

// setup.py gives the list as one string, separated by spaces.
std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> list;
  for (std::string word; stream >> word;) list.push_back(word);
  return list;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "How the compiled library of gdfq_ext was built.";
  module.attr("version") = GDFQ_VERSION;
  module.attr("compiler") = compiler();
  module.attr("cxx_standard") = __cplusplus / 100 % 100;
  module.attr("flags") = words(GDFQ_FLAGS);
  module.attr("torch_version") = GDFQ_TORCH_VERSION;
  module.attr("cuda_version") = GDFQ_CUDA_VERSION;
  module.attr("cuda_architectures") = words(GDFQ_CUDA_ARCHITECTURES);
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
