// The bits of the normals of elements [0, 4096) under seed 0x123456789abcdef, a line each, for an
// instruction set that this machine can only emulate; tests/test_vec.py compares them.
#include "cpu/normals.h"

#include <cstdio>
#include <cstring>

int main() {
  const fastvae::PhiloxKey key(0x89abcdefu, 0x01234567u);
  for (int block = 0; block < 64; ++block) {
    float out[fastvae::philox_block];
    fastvae::normal_block(key, block, out);
    for (const float& v : out) {
      int32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      std::printf("%d\n", bits);
    }
  }
}
