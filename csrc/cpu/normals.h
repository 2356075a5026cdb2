// The stream of normals, block by block, and a window on it.
#pragma once

#include "../math/philox.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// The normals of elements [block · 64, block · 64 + 64).
FASTVAE_INLINE void normal_block(const PhiloxKey& key, uint64_t block, float* out) {
  alignas(64) static constexpr int32_t iota[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                   8, 9, 10, 11, 12, 13, 14, 15};
  const uint64_t first = block * 16;  // a multiple of 16: adding a lane never carries
  for (int lane = 0; lane < 16; lane += I32::size()) {
    const I32 low = I32(static_cast<int32_t>(first)) + I32::loadu(iota + lane);
    const Philox w = philox4x32_10(low, static_cast<uint32_t>(first >> 32), key);
    F32 n[4];
    box_muller(w.word[0], w.word[1], n[0], n[1]);
    box_muller(w.word[2], w.word[3], n[2], n[3]);
    for (int k = 0; k < 4; ++k) n[k].store(out + 16 * k + lane);
  }
}

// A window on the stream: neighbouring requests are served from the normals already drawn.
class Normals {
 public:
  static constexpr int64_t max_request = 1024;

  // `in_order`: requests mostly follow one another.
  Normals(uint64_t seed, bool in_order)
      : key_(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
        look_ahead_(in_order ? 512 : 0) {}

  // Elements [i, i + n), n ≤ max_request; valid until the next call.
  const float* at(uint64_t i, int64_t n) {
    if (i < begin_ || i + n > end_) {
      begin_ = i - i % philox_block;
      const uint64_t wanted = i + n - begin_;
      // Short rows look ahead, so that one refill serves many of them.
      end_ = begin_ + (wanted < look_ahead_
                           ? look_ahead_
                           : (wanted + philox_block - 1) / philox_block * philox_block);
      for (uint64_t e = begin_; e < end_; e += philox_block)
        normal_block(key_, e / philox_block, buffer_ + (e - begin_));
    }
    return buffer_ + (i - begin_);
  }

 private:
  static constexpr int window = max_request + philox_block;
  PhiloxKey key_;
  uint64_t look_ahead_;
  uint64_t begin_ = 1, end_ = 0;
  alignas(64) float buffer_[window];
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
