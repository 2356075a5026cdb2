// Lanes where at::vec has nothing but loops over arrays: vectors of 16 bytes as the compiler knows
// them, SSE2 on x86-64. What lanes.h calls of at::vec, under its names.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../formulas/formula.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {
namespace generic {

template <class T>
struct Lanes {
  using value_type = T;
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Values [[gnu::vector_size(16)]] = T;
  using Bits [[gnu::vector_size(16)]] = Int;
  Values v;

  Lanes() = default;
  FASTVAE_INLINE Lanes(const Values& values) : v(values) {}
  FASTVAE_INLINE explicit Lanes(T value) : v(value - Values{}) {}  // a sum would lose −0
  static FASTVAE_INLINE Lanes of(const Bits& bits) { return std::bit_cast<Values>(bits); }
  FASTVAE_INLINE Bits bits() const { return std::bit_cast<Bits>(v); }
  static constexpr int size() { return 16 / sizeof(T); }

  // Zeros behind the first n.
  static FASTVAE_INLINE Lanes loadu(const void* p, int64_t n = size()) {
    Values values{};
    std::memcpy(&values, p, n * sizeof(T));
    return values;
  }
  FASTVAE_INLINE void store(void* p, int64_t n = size()) const {
    std::memcpy(p, &v, n * sizeof(T));
  }
  // `front` in the first n lanes.
  static FASTVAE_INLINE Lanes set(const Lanes& back, const Lanes& front, int64_t n) {
    return each([&](int j) { return (j < n ? front : back).v[j]; });
  }
  static FASTVAE_INLINE Lanes arange(T base, T step) {
    return each([&](int j) { return base + step * static_cast<T>(j); });
  }
  static FASTVAE_INLINE Lanes blendv(const Lanes& no, const Lanes& yes, const Lanes& mask) {
    return of((mask.bits() & yes.bits()) | (~mask.bits() & no.bits()));
  }
  // Bit j: lane j is 0.
  FASTVAE_INLINE int zero_mask() const {
#if defined(__SSE2__)
    const auto zeros = std::bit_cast<__m128i>(v == Values{});
    return sizeof(T) == 4 ? _mm_movemask_ps(_mm_castsi128_ps(zeros))
                          : _mm_movemask_pd(_mm_castsi128_pd(zeros));
#else
    int mask = 0;
    for (int j = 0; j < size(); ++j) mask |= (v[j] == T(0)) << j;
    return mask;
#endif
  }

  friend FASTVAE_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return modular(a, b, [](const auto& x, const auto& y) { return x + y; });
  }
  friend FASTVAE_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return modular(a, b, [](const auto& x, const auto& y) { return x - y; });
  }
  friend FASTVAE_INLINE Lanes operator*(const Lanes& a, const Lanes& b) { return a.v * b.v; }
  friend FASTVAE_INLINE Lanes operator/(const Lanes& a, const Lanes& b) { return a.v / b.v; }
  friend FASTVAE_INLINE Lanes operator<<(const Lanes& a, const Lanes& b) { return a.v << b.v; }
  friend FASTVAE_INLINE Lanes operator>>(const Lanes& a, const Lanes& b) { return a.v >> b.v; }
  friend FASTVAE_INLINE Lanes operator&(const Lanes& a, const Lanes& b) {
    return of(a.bits() & b.bits());
  }
  friend FASTVAE_INLINE Lanes operator|(const Lanes& a, const Lanes& b) {
    return of(a.bits() | b.bits());
  }
  friend FASTVAE_INLINE Lanes operator^(const Lanes& a, const Lanes& b) {
    return of(a.bits() ^ b.bits());
  }
  // Masks: lanes of all ones, and of zeros.
  friend FASTVAE_INLINE Lanes operator<(const Lanes& a, const Lanes& b) { return of(a.v < b.v); }
  friend FASTVAE_INLINE Lanes operator<=(const Lanes& a, const Lanes& b) { return of(a.v <= b.v); }
  friend FASTVAE_INLINE Lanes operator==(const Lanes& a, const Lanes& b) { return of(a.v == b.v); }
  FASTVAE_INLINE Lanes operator-() const { return -v; }

  // Ties to even.
  FASTVAE_INLINE Lanes round() const {
    const Lanes sign = *this & Lanes(T(-0.0)), size = *this ^ sign;
    const Lanes whole(sizeof(T) == 4 ? T(0x1p23) : T(0x1p52));  // its last place is 1
    return sign | blendv(size, (size + whole) - whole, size < whole);
  }
  FASTVAE_INLINE Lanes sqrt() const {
#if defined(__SSE2__)
    if constexpr (sizeof(T) == 4) return Values(_mm_sqrt_ps(v));
    if constexpr (sizeof(T) == 8) return Values(_mm_sqrt_pd(v));
#endif
    return each([&](int j) { return std::sqrt(v[j]); });
  }
  // Of doubles; the C library's take an FMA where there is one: vectors of two are no faster.
  FASTVAE_INLINE Lanes exp() const {
    return each([&](int j) { return std::exp(v[j]); });
  }
  FASTVAE_INLINE Lanes log() const {
    return each([&](int j) { return std::log(v[j]); });
  }
  FASTVAE_INLINE Lanes log1p() const {
    return each([&](int j) { return std::log1p(v[j]); });
  }

 private:
  // Integers that wrap around, as those of instructions do.
  template <class Fn>
  static FASTVAE_INLINE Lanes modular(const Lanes& a, const Lanes& b, const Fn& fn) {
    if constexpr (std::is_integral_v<T>) {
      using Unsigned [[gnu::vector_size(16)]] = std::make_unsigned_t<T>;
      return std::bit_cast<Values>(fn(std::bit_cast<Unsigned>(a.v), std::bit_cast<Unsigned>(b.v)));
    } else {
      return fn(a.v, b.v);
    }
  }
  template <class Fn>
  static FASTVAE_INLINE Lanes each(const Fn& fn) {
    Values out{};
    for (int j = 0; j < size(); ++j) out[j] = fn(j);
    return out;
  }
};

using F32 = Lanes<float>;
using I32 = Lanes<int32_t>;

// The greater; NaN where either is.
template <class T>
FASTVAE_INLINE Lanes<T> maximum(const Lanes<T>& a, const Lanes<T>& b) {
  return Lanes<T>::blendv(b, a, (b < a) | Lanes<T>::of(a.v != a.v));
}
// These keep NaN.
template <class T>
FASTVAE_INLINE Lanes<T> clamp_min(const Lanes<T>& x, const Lanes<T>& low) {
#if defined(__SSE2__)
  using Values = typename Lanes<T>::Values;
  if constexpr (sizeof(T) == 4)
    return Values(_mm_max_ps(low.v, x.v));
  else
    return Values(_mm_max_pd(low.v, x.v));
#else
  return Lanes<T>::blendv(x, low, x < low);
#endif
}
template <class T>
FASTVAE_INLINE Lanes<T> clamp(const Lanes<T>& x, const Lanes<T>& low, const Lanes<T>& high) {
  return -clamp_min(-clamp_min(x, low), -high);
}

// a b + c, a b − c, c − a b in two roundings.
template <class T>
FASTVAE_INLINE Lanes<T> fmadd(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
  return a * b + c;
}
template <class T>
FASTVAE_INLINE Lanes<T> fmsub(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
  return a * b - c;
}
template <class T>
FASTVAE_INLINE Lanes<T> fnmadd(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
  return c - a * b;
}

template <class To, class From>
FASTVAE_INLINE Lanes<To> cast(const Lanes<From>& x) {
  return std::bit_cast<Lanes<To>>(x);
}
template <class T>
FASTVAE_INLINE Lanes<T> convert_to_fp_of_same_size(const I32& x) {
  return __builtin_convertvector(x.v, typename Lanes<T>::Values);
}
FASTVAE_INLINE I32 convert_to_int_of_same_size(const F32& x) {
  return __builtin_convertvector(x.v, I32::Values);
}

// (a0 a1 a2 a3), (b0 b1 b2 b3) to and from (a0 b0 a1 b1), (a2 b2 a3 b3).
template <int i, int j, int k, int l>
FASTVAE_INLINE F32 shuffled(const F32& a, const F32& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, i, j, k, l);
#else  // g++ has the other since 12
  return __builtin_shuffle(a.v, b.v, F32::Bits{i, j, k, l});
#endif
}
FASTVAE_INLINE std::pair<F32, F32> interleave2(const F32& a, const F32& b) {
  return {shuffled<0, 4, 1, 5>(a, b), shuffled<2, 6, 3, 7>(a, b)};
}
FASTVAE_INLINE std::pair<F32, F32> deinterleave2(const F32& a, const F32& b) {
  return {shuffled<0, 2, 4, 6>(a, b), shuffled<1, 3, 5, 7>(a, b)};
}

}  // namespace generic
}  // namespace CPU_CAPABILITY
}  // namespace fastvae
