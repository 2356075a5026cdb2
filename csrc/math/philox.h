// Counter-based standard normals: Philox4x32-10 (Salmon et al. 2011) and Box–Muller.
//
// The normal of element i depends on (seed, i) alone: counter 16·(i div 64) + i mod 16, and of that
// counter's four normals the (i mod 64) div 16-th, so that 16 lanes of counters fill 64 elements.
#pragma once

#include "math.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

constexpr int philox_block = 64;  // elements that 16 counters fill

// Four words per lane.
struct Philox {
  I32 word[4];
};

// A word of every lane, as multiplications leave it.
#if defined(CPU_CAPABILITY_AVX2)
// Two vectors of four 64-bit lanes, for the even and the odd counters. The upper halves hold what
// no multiplication reads; a high half is then one shift, where packing takes five instructions.
struct Word {
  __m256i even, odd;

  static FASTVAE_INLINE Word of(const I32& x) { return {x, _mm256_srli_epi64(x, 32)}; }
  FASTVAE_INLINE I32 packed() const {
    return I32(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
  }
  friend FASTVAE_INLINE Word operator^(const Word& a, const Word& b) {
    return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)};
  }
  friend FASTVAE_INLINE Word operator^(const Word& a, uint32_t k) {
    const __m256i c = _mm256_set1_epi32(static_cast<int32_t>(k));
    return {_mm256_xor_si256(a.even, c), _mm256_xor_si256(a.odd, c)};
  }
};
#else
struct Word {
  I32 lanes;

  static FASTVAE_INLINE Word of(const I32& x) { return {x}; }
  FASTVAE_INLINE I32 packed() const { return lanes; }
  friend FASTVAE_INLINE Word operator^(const Word& a, const Word& b) { return {a.lanes ^ b.lanes}; }
  friend FASTVAE_INLINE Word operator^(const Word& a, uint32_t k) {
    return {a.lanes ^ I32(static_cast<int32_t>(k))};
  }
};
#endif

struct HiLo {
  Word hi, lo;
};

// The two halves of the 64-bit product m · a, lane by lane, unsigned.
FASTVAE_INLINE HiLo mul_hi_lo(const Word& a, uint32_t m) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i mm = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(a.lanes, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.lanes, 32), mm);
  return {{I32(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB))},
          {I32(_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB))}};
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i mm = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32(a.even, mm), odd = _mm256_mul_epu32(a.odd, mm);
  return {{_mm256_srli_epi64(even, 32), _mm256_srli_epi64(odd, 32)}, {even, odd}};
#elif defined(__CUDACC__)
  const auto in = static_cast<uint32_t>(a.lanes.v);
  return {{I32(static_cast<int32_t>(__umulhi(in, m)))}, {I32(static_cast<int32_t>(in * m))}};
#elif defined(__aarch64__)
  const uint32x4_t in = vreinterpretq_u32_s32(a.lanes);
  const uint32x4_t low = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(in), m)),
                   high = vreinterpretq_u32_u64(vmull_high_n_u32(in, m));
  return {{I32(vreinterpretq_s32_u32(vuzp2q_u32(low, high)))},
          {I32(vreinterpretq_s32_u32(vuzp1q_u32(low, high)))}};
#else
  int32_t in[I32::size()], hi[I32::size()], lo[I32::size()];
  a.lanes.store(in);
  for (int j = 0; j < I32::size(); ++j) {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(in[j])) * m;
    hi[j] = static_cast<int32_t>(product >> 32);
    lo[j] = static_cast<int32_t>(product);
  }
  return {{I32::loadu(hi)}, {I32::loadu(lo)}};
#endif
}

// a ^ b ^ k; a comes last, from a multiplication.
FASTVAE_INLINE Word xor3(const Word& a, const Word& b, uint32_t k) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i c = _mm512_set1_epi32(static_cast<int32_t>(k));
  return {I32(_mm512_ternarylogic_epi32(a.lanes, b.lanes, c, 0x96))};
#else
  return a ^ (b ^ k);
#endif
}

struct PhiloxKey {
  uint32_t round[10][2];

  explicit FASTVAE_INLINE PhiloxKey(uint32_t key0, uint32_t key1) {
    for (auto& k : round) {
      k[0] = key0;
      k[1] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

constexpr uint32_t philox_m0 = 0xD2511F53u, philox_m1 = 0xCD9E8D57u;

struct PhiloxState {
  Word word[4];
};

FASTVAE_INLINE Philox philox_rounds(PhiloxState c, const PhiloxKey& key, int first) {
  for (int r = first; r < 10; ++r) {
    const HiLo a = mul_hi_lo(c.word[0], philox_m0), b = mul_hi_lo(c.word[2], philox_m1);
    c = {xor3(b.hi, c.word[1], key.round[r][0]), b.lo, xor3(a.hi, c.word[3], key.round[r][1]),
         a.lo};
  }
  return {c.word[0].packed(), c.word[1].packed(), c.word[2].packed(), c.word[3].packed()};
}

FASTVAE_INLINE Philox philox4x32_10(const Philox& c, const PhiloxKey& key) {
  PhiloxState state;
  for (int j = 0; j < 4; ++j) state.word[j] = Word::of(c.word[j]);
  return philox_rounds(state, key, 0);
}

// The same for the counters (low, high, 0, 0): in the first two rounds half of the words are alike
// in all lanes.
FASTVAE_INLINE Philox philox4x32_10(const I32& low, uint32_t high, const PhiloxKey& key) {
  const HiLo a = mul_hi_lo(Word::of(low), philox_m0);
  const uint64_t product = static_cast<uint64_t>(high ^ key.round[0][0]) * philox_m0;
  const HiLo b = mul_hi_lo(a.hi ^ key.round[0][1], philox_m1);
  const uint32_t product_high = static_cast<uint32_t>(product >> 32);
  return philox_rounds({b.hi ^ key.round[1][0], b.lo, a.lo ^ (product_high ^ key.round[1][1]),
                        Word::of(I32(static_cast<int32_t>(product)))},
                       key, 2);
}

// Two normals from two words. The uniform under the logarithm has 31 bits and is never 0, so the
// tail reaches 6.66σ; the angle has all 32.
FASTVAE_INLINE void box_muller(const I32& a, const I32& b, F32& n0, F32& n1) {
  const I32 a31 = shift_right_unsigned<1>(a);
  const F32 u = fmadd(to_floats(a31), F32(0x1p-31f), F32(0x1p-32f));
  const F32 radius = (F32(-2.f) * log_unit(u)).sqrt();
  const SinCos angle = sincospi(to_floats(b) * F32(0x1p-31f));
  n0 = radius * angle.cos;
  n1 = radius * angle.sin;
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
