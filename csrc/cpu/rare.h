// The elements that a formula leaves to its eval_rare: packed into whole vectors, done, put back.
#pragma once

#include "formula_tile.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// The tile's elements that eval leaves to eval_rare, packed: their values are added, to the sum
// returned or to the elements', and their gradients written over eval's.
template <class F, class T, bool Grad, bool Short>
class RareLanes {
  using V = Vec<T>;
  static constexpr int N = rare_inputs<F>, W = V::size();

 public:
  double add(const Pointers<F, T, T, T>& t, int64_t n, const V* options, T scale) {
    const Counts found = pack(t, n);
    return each<0>(t, small_, found.small, options, scale) +
           each<1>(t, large_, found.large, options, scale);
  }

 private:
  // Writes the chosen lanes' places in the tile; their number.
  static FASTVAE_INLINE int64_t places(const Mask<V>& chosen, int64_t first, int32_t* index) {
    uint32_t lanes = bits<V>(chosen);
    const int64_t count = __builtin_popcount(lanes);
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (sizeof(T) == 4) {
      const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), iota);
      _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(chosen, at));
      return count;
    }
#endif
    for (; lanes != 0; lanes &= lanes - 1)
      *index++ = static_cast<int32_t>(first) + __builtin_ctz(lanes);
    return count;
  }

  struct Counts {
    int64_t small, large;
  };

  // Finds where x is a small count and where a large one.
  FASTVAE_INLINE Counts pack(const Pointers<F, T, T, T>& t, int64_t n) {
    const V zero = num<V>(0), limit = num<V>(F::rare_limit);
    Counts found{};
    for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const V x = V::loadu(t.x + i, count);  // 0 behind a partial vector
      auto some = less(zero, x);
      if (t.mask) some = some & less(zero, V::loadu(t.mask + i, count));
      const auto large = some & less(limit, x);
      found.small += places(some & less_equal(x, limit), i, small_ + found.small);
      if (any<V>(large)) found.large += places(large, i, large_ + found.large);
    });
    return found;
  }

  template <int kind>
  double each(const Pointers<F, T, T, T>& t, const int32_t* index, int64_t count, const V* options,
              T scale) {
    if (count == 0) return 0;
    for (int j = 0; j < N; ++j) {
      const T* from = j == 0 ? t.x : t.param[j];
      for (int64_t i = 0; i < count; ++i) in_[j][i] = from[index[i]];
      // Whole vectors: 1 lies in every domain.
      std::fill_n(in_[j] + count, (W - count % W) % W, T(1));
    }
    const double total = sum_vectors<T>(
        count, [&](int64_t i, auto size, Sum<T>& sum) __attribute__((always_inline)) {
          V in[N];
          for (int j = 0; j < N; ++j) in[j] = V::loadu(in_[j] + i);
          const auto r = F::template eval_rare<V, kind>(in, options);
          if constexpr (Short) r.value.store(value_ + i);
          V value = r.value;
          if constexpr (std::is_same_v<decltype(size), int64_t>)
            value = V::set(V(T(0)), value, size);
          sum.add(value);
          for (int j = 1; Grad && j < N; ++j) (V(scale) * r.grad[j]).store(in_[j] + i);
        });
    if constexpr (Short)
      for (int64_t i = 0; i < count; ++i) t.value[index[i]] += value_[i];
    for (int j = 1; Grad && j < N; ++j) {
      if (!t.dparam[j]) continue;
      for (int64_t i = 0; i < count; ++i) {
        T g = in_[j][i];
        if constexpr (Short) g = t.factor[index[i]] == T(0) ? T(0) : t.factor[index[i]] * g;
        t.dparam[j][index[i]] = g;
      }
    }
    return total;
  }

  int32_t small_[tile + 16], large_[tile + 16];
  alignas(64) T in_[N][tile + W], value_[Short ? tile + W : 1];
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
