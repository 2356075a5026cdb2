// Lanes: numbers side by side, on at::vec::Vectorized or generic.h; their masks, bits, tables and
// conversions.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "generic.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// at::vec is written out for these.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
namespace vec = at::vec;
template <class T>
using Vec = vec::Vectorized<T>;
#else
#define FASTVAE_GENERIC 1
namespace vec = generic;
template <class T>
using Vec = vec::Lanes<T>;
#endif
using F32 = Vec<float>;
using F64 = Vec<double>;
using I32 = Vec<int32_t>;

template <class V>
FASTVAE_INLINE V num(double v) {
  return V(static_cast<typename V::value_type>(v));
}

// Masks: bits of a mask register on AVX-512, lanes of all ones elsewhere. Comparisons with NaN are
// false.
#if defined(CPU_CAPABILITY_AVX512)
template <class V>
using Mask = std::conditional_t<std::is_same_v<V, F32>, __mmask16, __mmask8>;
#define FASTVAE_COMPARE(name, op, OP)                         \
  FASTVAE_INLINE __mmask16 name(const F32& a, const F32& b) { \
    return _mm512_cmp_ps_mask(a, b, OP);                      \
  }                                                           \
  FASTVAE_INLINE __mmask8 name(const F64& a, const F64& b) { return _mm512_cmp_pd_mask(a, b, OP); }
FASTVAE_INLINE F32 select(__mmask16 m, const F32& yes, const F32& no) {
  return _mm512_mask_blend_ps(m, no, yes);
}
FASTVAE_INLINE F64 select(__mmask8 m, const F64& yes, const F64& no) {
  return _mm512_mask_blend_pd(m, no, yes);
}
template <class V>
FASTVAE_INLINE bool all(const Mask<V>& m) {
  return m == static_cast<Mask<V>>(-1);
}
// The lanes as bits.
template <class V>
FASTVAE_INLINE uint32_t bits(const Mask<V>& m) {
  return m;
}
#else
template <class V>
using Mask = V;
#define FASTVAE_COMPARE(name, op, OP)                                    \
  FASTVAE_INLINE F32 name(const F32& a, const F32& b) { return a op b; } \
  FASTVAE_INLINE F64 name(const F64& a, const F64& b) { return a op b; }
#if defined(CPU_CAPABILITY_AVX2) && defined(__GNUC__)
// GCC 12 makes a second comparison of a mask that the intrinsic blends by.
FASTVAE_INLINE F32 select(const F32& m, const F32& yes, const F32& no) {
  __m256 r;
  asm("vblendvps %3, %2, %1, %0" : "=x"(r) : "x"(__m256(no)), "x"(__m256(yes)), "x"(__m256(m)));
  return r;
}
FASTVAE_INLINE F64 select(const F64& m, const F64& yes, const F64& no) {
  __m256d r;
  asm("vblendvpd %3, %2, %1, %0" : "=x"(r) : "x"(__m256d(no)), "x"(__m256d(yes)), "x"(__m256d(m)));
  return r;
}
#else
template <class V>
FASTVAE_INLINE V select(const V& m, const V& yes, const V& no) {
  return V::blendv(no, yes, m);
}
#endif
template <class V>
FASTVAE_INLINE bool all(const Mask<V>& m) {
  return m.zero_mask() == 0;
}
template <class V>
FASTVAE_INLINE uint32_t bits(const Mask<V>& m) {
  return ~static_cast<uint32_t>(m.zero_mask()) & ((1u << V::size()) - 1);
}
#endif
template <class V>
FASTVAE_INLINE bool any(const Mask<V>& m) {
  return bits<V>(m) != 0;
}
FASTVAE_COMPARE(less, <, _CMP_LT_OQ)
FASTVAE_COMPARE(less_equal, <=, _CMP_LE_OQ)
FASTVAE_COMPARE(equal, ==, _CMP_EQ_OQ)
#undef FASTVAE_COMPARE

template <class V>
FASTVAE_INLINE Mask<V> between(const V& low, const V& x, const V& high) {
  return less_equal(low, x) & less_equal(x, high);
}

// wide[…] += v, lane by lane.
FASTVAE_INLINE void add_wide(const F32& v, F64 (&wide)[2]) {
#if defined(CPU_CAPABILITY_AVX512)
  const F64 low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
            high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const F64 low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)),
            high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  float narrow[F32::size()];
  double lanes[F32::size()];
  v.store(narrow);
  for (int j = 0; j < F32::size(); ++j) lanes[j] = static_cast<double>(narrow[j]);
  const F64 low = F64::loadu(lanes), high = F64::loadu(lanes + F64::size());
#endif
  wide[0] = wide[0] + low;
  wide[1] = wide[1] + high;
}
FASTVAE_INLINE void add_wide(const F64& v, F64 (&wide)[1]) { wide[0] = wide[0] + v; }

// Of all lanes; what max_lanes is where one is NaN is not said.
#if defined(CPU_CAPABILITY_AVX512)
FASTVAE_INLINE float sum_lanes(const F32& v) { return _mm512_reduce_add_ps(v); }
FASTVAE_INLINE double sum_lanes(const F64& v) { return _mm512_reduce_add_pd(v); }
FASTVAE_INLINE float max_lanes(const F32& v) { return _mm512_reduce_max_ps(v); }
FASTVAE_INLINE double max_lanes(const F64& v) { return _mm512_reduce_max_pd(v); }
#else
template <class V, class Op>
FASTVAE_INLINE auto fold_lanes(V v, Op op) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<V, F32>) {
    v = op(v, V(_mm256_permute2f128_ps(v, v, 1)));
    v = op(v, V(_mm256_permute_ps(v, 0b01001110)));
    v = op(v, V(_mm256_permute_ps(v, 0b10110001)));
    return _mm256_cvtss_f32(v);
  } else {
    v = op(v, V(_mm256_permute2f128_pd(v, v, 1)));
    v = op(v, V(_mm256_permute_pd(v, 0b0101)));
    return _mm256_cvtsd_f64(v);
  }
#endif
  typename V::value_type lanes[V::size()];
  v.store(lanes);
  for (int half = V::size() / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = op(lanes[i], lanes[i + half]);
  return lanes[0];
}
template <class V>
FASTVAE_INLINE auto sum_lanes(const V& v) {
  return fold_lanes(v, [](const auto& a, const auto& b) { return a + b; });
}
template <class V>
FASTVAE_INLINE auto max_lanes(const V& v) {
  return fold_lanes(v, []<class A>(const A& a, const A& b) {
    if constexpr (std::is_same_v<A, V>)
      return A(vec::maximum(a, b));
    else
      return b < a ? a : b;
  });
}
#endif

FASTVAE_INLINE F32 max(const F32& a, const F32& b) { return vec::maximum(a, b); }
FASTVAE_INLINE F64 max(const F64& a, const F64& b) { return vec::maximum(a, b); }
// These keep NaN.
template <class V>
FASTVAE_INLINE V clamp(const V& x, const V& low, const V& high) {
  return vec::clamp(x, low, high);
}
template <class V>
FASTVAE_INLINE V clamp_min(const V& x, const V& low) {
  return vec::clamp_min(x, low);
}

// a ≥ 0 with the sign of b.
template <class V>
FASTVAE_INLINE V with_sign(const V& a, const V& b) {
  return a | (b & num<V>(-0.0));
}

// Where the sign bit is set, for select().
template <class V>
FASTVAE_INLINE Mask<V> sign_bit(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, F32>)
    return _mm512_movepi32_mask(_mm512_castps_si512(x));
  else
    return _mm512_movepi64_mask(_mm512_castpd_si512(x));
#elif defined(CPU_CAPABILITY_AVX2)
  return x;  // a blend looks at nothing else
#else
  return less(with_sign(num<V>(1), x), num<V>(0));
#endif
}

#if !defined(FASTVAE_GENERIC)
// table[i mod 8] for each lane.
FASTVAE_INLINE F32 lookup8(const float (&table)[8], const I32& i) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permutexvar_ps(i, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
#else
  // Byte by byte: 4 (i mod 8) + 0, 1, 2, 3.
  const uint32x4_t bytes = vmlaq_n_u32(
      vdupq_n_u32(0x03020100), vandq_u32(vreinterpretq_u32_s32(i), vdupq_n_u32(7)), 0x04040404);
  const auto* p = reinterpret_cast<const uint8_t*>(table);
  return vreinterpretq_f32_u8(
      vqtbl2q_u8({{vld1q_u8(p), vld1q_u8(p + 16)}}, vreinterpretq_u8_u32(bytes)));
#endif
}
#endif

// table[i] for each lane, i a whole number in [0, 16).
template <class V>
FASTVAE_INLINE V lookup16(const double (&table)[16], const V& i) {
  using T = typename V::value_type;
  T narrow[16], at[V::size()], out[V::size()];
  std::copy_n(table, 16, narrow);
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, F32>)
    return _mm512_permutexvar_ps(_mm512_cvtps_epi32(i), _mm512_loadu_ps(narrow));
#endif
  i.store(at);
  for (int j = 0; j < V::size(); ++j) out[j] = narrow[static_cast<int>(at[j])];
  return V::loadu(out);
}

// The bits of each lane shifted by a constant; `>>` keeps the sign.
template <int places>
FASTVAE_INLINE I32 shift_left(const I32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return I32(_mm512_slli_epi32(x, places));
#elif defined(CPU_CAPABILITY_AVX2)
  return I32(_mm256_slli_epi32(x, places));
#else
  return x << I32(places);
#endif
}

// Zeros come in from the left.
template <int places>
FASTVAE_INLINE I32 shift_right_unsigned(const I32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return I32(_mm512_srli_epi32(x, places));
#elif defined(CPU_CAPABILITY_AVX2)
  return I32(_mm256_srli_epi32(x, places));
#else
  return (x >> I32(places)) & I32(static_cast<int32_t>(~0u >> places));
#endif
}

// The same bits as another type; and conversions by value, to integers towards 0.
FASTVAE_INLINE I32 as_ints(const F32& x) { return vec::cast<int32_t>(x); }
FASTVAE_INLINE F32 as_floats(const I32& x) { return vec::cast<float>(x); }
FASTVAE_INLINE F32 to_floats(const I32& x) { return vec::convert_to_fp_of_same_size<float>(x); }
FASTVAE_INLINE I32 to_ints(const F32& x) { return vec::convert_to_int_of_same_size(x); }

// The nearest integers, ties to even.
FASTVAE_INLINE I32 nearest(const F32& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtps_epi32(x);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtps_epi32(x);
#elif defined(__aarch64__)
  return I32(vcvtnq_s32_f32(x));
#else
  return to_ints(x.round());
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
