// Whether what formulas read lies where it must, vector by vector.
#pragma once

#include "lanes.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// Whether each lane lies in the domain; NaN does in `real` alone.
template <Domain domain, class V>
FASTVAE_INLINE Mask<V> in_domain(const V& x) {
  const V zero = num<V>(0);
  if constexpr (domain == Domain::unit)
    return between(zero, x, num<V>(1));
  else if constexpr (domain == Domain::nonnegative)
    return less_equal(zero, x);
  else if constexpr (domain == Domain::positive)
    return less(zero, x);
  else
    return less_equal(zero, x) & equal(x, x.round()) &
           less(x, num<V>(std::numeric_limits<double>::infinity()));
}

// Whether all that was added lies in the domain. May say no to −0 as well: who gets a no looks
// again.
template <class V, Domain domain>
class Inside {
 public:
  FASTVAE_INLINE void add(const V& x) { inside_ = inside_ & in_domain<domain>(x); }
  FASTVAE_INLINE bool all() const { return fastvae::all<V>(inside_); }

 private:
  Mask<V> inside_ = equal(num<V>(0), num<V>(0));
};

template <class V>
class Inside<V, Domain::real> {
 public:
  FASTVAE_INLINE void add(const V&) {}
  FASTVAE_INLINE bool all() const { return true; }
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Non-negative floats are ordered as their bits are; NaN and negative ones come behind, unsigned.
template <>
class Inside<F32, Domain::unit> {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  FASTVAE_INLINE void add(const F32& x) { most_ = _mm512_max_epu32(most_, _mm512_castps_si512(x)); }
  FASTVAE_INLINE bool all() const {
    return _mm512_cmpgt_epu32_mask(most_, _mm512_set1_epi32(one)) == 0;
  }

 private:
  static constexpr int32_t one = 0x3f800000;
  __m512i most_ = _mm512_setzero_si512();
#else
  FASTVAE_INLINE void add(const F32& x) { most_ = _mm256_max_epu32(most_, _mm256_castps_si256(x)); }
  FASTVAE_INLINE bool all() const {
    const __m256i limit = _mm256_set1_epi32(one);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(most_, limit), limit)) == -1;
  }

 private:
  static constexpr int32_t one = 0x3f800000;
  __m256i most_ = _mm256_setzero_si256();
#endif
};
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
