// Picks the instruction set once, at first use.
#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace fastvae {

extern const Kernels kernels_DEFAULT;
#if defined(FASTVAE_X86)
extern const Kernels kernels_AVX2;
extern const Kernels kernels_AVX512;
#endif

const Kernels& kernels() {
  static const Kernels& table = []() -> const Kernels& {
#if defined(FASTVAE_X86)
    const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
    if (capability == "AVX512") return kernels_AVX512;
    if (capability == "AVX2") return kernels_AVX2;
#endif
    return kernels_DEFAULT;
  }();
  return table;
}

const char* compiled_isas() {
#if defined(FASTVAE_X86)
  return "DEFAULT,AVX2,AVX512";
#else
  return "DEFAULT";
#endif
}

}  // namespace fastvae
