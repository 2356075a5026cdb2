// Vectors read from and written to memory of any element type, converted on the way.
#pragma once

#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

template <class Fn>
inline void with_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f64:
      return fn(double{});
    case DType::f32:
      return fn(float{});
    case DType::bf16:
      return fn(c10::BFloat16{});
    case DType::f16:
      return fn(c10::Half{});
    case DType::u8:
      return fn(uint8_t{});
  }
}

template <class T>
constexpr DType dtype_of = std::is_same_v<T, double> ? DType::f64 : DType::f32;

// What a loop in the compute type T reads and writes where it lies, converting within itself. Not
// so bfloat16's rounding: its ten instructions are cheaper in a pass of their own over each tile,
// two vectors at a time (AVX2, Bernoulli: 0.96 ns an element against 1.18; float32 0.80).
template <class T>
inline bool reads(DType dtype) {
  return dtype == dtype_of<T> ||
         (std::is_same_v<T, float> && (dtype == DType::bf16 || dtype == DType::f16));
}
template <class T>
inline bool writes(DType dtype) {
  return reads<T>(dtype) && dtype != DType::bf16;
}

FASTVAE_INLINE F32 read_vector(const c10::BFloat16* p) {
  F32 v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}

FASTVAE_INLINE F32 read_vector(const c10::Half* p) {
  F32 v;
  at::vec::load_fp32_from_fp16(p, v);
  return v;
}

FASTVAE_INLINE void write_vector(const F32& v, c10::Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_fp16(__m512(v)));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_fp16(__m256(v)));
#else
  float lanes[F32::size()];
  v.store(lanes);
  for (int j = 0; j < F32::size(); ++j) p[j] = c10::Half(lanes[j]);
#endif
}

// `count` elements from p on, zeros behind them. The count is a constant where it is a vector's.
template <class S, class Count>
FASTVAE_INLINE F32 read_some(const S* p, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    S some[F32::size()] = {};
    std::memcpy(static_cast<void*>(some), p, count * sizeof(S));
    return read_vector(some);
  } else {
    return read_vector(p);
  }
}

// Elements in memory, of a dtype that T reads().
template <class T>
struct Source {
  const void* data;
  DType dtype;

  template <class Count>
  FASTVAE_INLINE Vec<T> read(int64_t i, Count count) const {
    if constexpr (std::is_same_v<T, float>) {
      if (__builtin_expect(dtype == DType::bf16, 0))
        return read_some(static_cast<const c10::BFloat16*>(data) + i, count);
      if (__builtin_expect(dtype == DType::f16, 0))
        return read_some(static_cast<const c10::Half*>(data) + i, count);
    }
    return Vec<T>::loadu(static_cast<const T*>(data) + i, count);
  }

  T value(int64_t i) const {
    if (dtype == DType::bf16) return static_cast<T>(static_cast<const c10::BFloat16*>(data)[i]);
    if (dtype == DType::f16) return static_cast<T>(static_cast<const c10::Half*>(data)[i]);
    return static_cast<const T*>(data)[i];
  }

  // Fetches element i into the cache; of a tile of 16-bit elements each line twice, which is free.
  FASTVAE_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(static_cast<const T*>(data) + i, 0, 2);
  }
};

// The same to write to, of a dtype that T writes().
template <class T>
struct Sink {
  void* data = nullptr;  // null: not wanted
  DType dtype = dtype_of<T>;

  template <class Count>
  FASTVAE_INLINE void write(const Vec<T>& v, int64_t i, Count count) const {
    if constexpr (std::is_same_v<T, float>) {
      if (__builtin_expect(dtype == DType::f16, 0)) {
        c10::Half* const p = static_cast<c10::Half*>(data) + i;
        c10::Half some[F32::size()];
        if constexpr (!std::is_same_v<Count, int64_t>) return write_vector(v, p);
        write_vector(v, some);
        std::memcpy(static_cast<void*>(p), some, count * sizeof *p);
        return;
      }
    }
    v.store(static_cast<T*>(data) + i, count);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
