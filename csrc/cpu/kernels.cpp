// Instantiates the kernels. Compiled once per instruction set, each in its own namespace.
#include <algorithm>
#include <cstring>

#include "../math/compounds.h"

#include "rowwise.h"
#include "sampling.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

void sample_kernel(const SampleArgs& a) {
  a.use_double ? sample_as<double>(a) : sample_as<float>(a);
}

void sample_backward_kernel(const SampleBackwardArgs& a) {
  a.use_double ? sample_backward_as<double>(a) : sample_backward_as<float>(a);
}

void rowwise_kernel(const RowwiseArgs& a) { rowwise(a); }

void philox_kernel(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  Philox c;
  for (int j = 0; j < 4; ++j) c.word[j] = I32(static_cast<int32_t>(counter[j]));
  c = philox4x32_10(c, PhiloxKey(key[0], key[1]));
  int32_t lanes[I32::size()];
  for (int j = 0; j < 4; ++j) {
    c.word[j].store(lanes);
    out[j] = static_cast<uint32_t>(lanes[I32::size() - 1]);
  }
}

}  // namespace CPU_CAPABILITY

#define FASTVAE_STRING2(x) #x
#define FASTVAE_STRING(x) FASTVAE_STRING2(x)
#define FASTVAE_TABLE2(isa) kernels_##isa
#define FASTVAE_TABLE(isa) FASTVAE_TABLE2(isa)
extern const Kernels FASTVAE_TABLE(CPU_CAPABILITY);
const Kernels FASTVAE_TABLE(CPU_CAPABILITY) = {FASTVAE_STRING(CPU_CAPABILITY), rowwise_kernel,
                                               sample_kernel, sample_backward_kernel,
                                               philox_kernel};

}  // namespace fastvae
