// How elements lie in memory, as the vectors that a formula is called for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>

#include "lanes.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// What a formula is called for at once: one vector, or where the parameters are bfloat16 two of
// float, the elements at even and at odd places, for these need no shuffle to be loaded and stored.
template <class T, class S>
constexpr int parts = sizeof(T) / sizeof(S);

// How many of a group's first n elements are in part p of P.
template <int P>
FASTVAE_INLINE int64_t in_part(int64_t n, int p) {
  return (n + P - 1 - p) / P;
}

// The group at p, n elements of it (all, where n is a compile-time constant), zeros behind.
template <class T, int P, class Count>
FASTVAE_INLINE void load(const T* p, Count n, Vec<T> (&v)[P]) {
  constexpr int64_t width = Vec<T>::size();
  if constexpr (P == 1) {
    v[0] = Vec<T>::loadu(p, n);
  } else {
    T group[P * width] = {};
    if constexpr (std::is_same_v<Count, int64_t>) {
      std::copy_n(p, n, group);
      p = group;
    }
    std::tie(v[0], v[1]) = vec::deinterleave2(Vec<T>::loadu(p), Vec<T>::loadu(p + width));
  }
}

template <class T, int P, class Count>
FASTVAE_INLINE void store(const Vec<T> (&v)[P], T* p, Count n) {
  constexpr int64_t width = Vec<T>::size();
  if constexpr (P == 1) {
    v[0].store(p, n);
  } else {
    const auto [low, high] = vec::interleave2(v[0], v[1]);
    low.store(p, std::min<int64_t>(n, width));
    if (n > width) high.store(p + width, n - width);
  }
}

using Bits = uint32_t __attribute__((vector_size(sizeof(F32))));

template <class Count>
FASTVAE_INLINE void load(const c10::BFloat16* p, Count n, F32 (&v)[2]) {
  Bits bits{};
  std::memcpy(&bits, p, n * sizeof *p);
  v[0] = std::bit_cast<F32>(Bits(bits << 16));
  v[1] = std::bit_cast<F32>(Bits(bits & 0xffff0000u));
}

// The upper halves are the nearest bfloat16, ties to even.
FASTVAE_INLINE Bits rounded(const F32& v) {
  using Floats = float __attribute__((vector_size(sizeof(F32))));
  const auto f = std::bit_cast<Floats>(v);
  const auto b = std::bit_cast<Bits>(v);
  // The sum of a NaN may overflow into a zero.
  return (b + 0x7fffu + (b >> 16 & 1u)) | reinterpret_cast<Bits>(f != f);
}

template <class Count>
FASTVAE_INLINE void store(const F32 (&v)[2], c10::BFloat16* p, Count n) {
  const Bits bits = rounded(v[0]) >> 16 | (rounded(v[1]) & 0xffff0000u);
  std::memcpy(p, &bits, n * sizeof *p);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
