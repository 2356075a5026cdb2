// How threads read and write what any dtype stores, a few neighbours at a time, and add up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"
#include "lanes.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

using cuda::block_threads;
using cuda::Source;
using cuda::Target;

template <class T>
constexpr int width = cuda::per_thread(sizeof(T) == 8);

FASTVAE_INLINE int64_t row_of(int64_t row, int64_t period) {
  if (row < period) return row;
  if (period == 1) return 0;
  if (row >> 31 == 0) return static_cast<uint32_t>(row) % static_cast<uint32_t>(period);
  return row % period;
}

template <class T>
FASTVAE_INLINE T load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<T>(static_cast<const double*>(data)[i]);
    case DType::bf16:
      return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
    case DType::f16:
      return static_cast<T>(__half2float(static_cast<const __half*>(data)[i]));
    default:
      return static_cast<T>(static_cast<const float*>(data)[i]);
  }
}

// Data may be whole numbers.
template <class T>
FASTVAE_INLINE T load_one(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::u8:
      return static_cast<T>(static_cast<const uint8_t*>(data)[i]);
    case DType::i8:
      return static_cast<T>(static_cast<const int8_t*>(data)[i]);
    case DType::i16:
      return static_cast<T>(static_cast<const int16_t*>(data)[i]);
    case DType::i32:
      return static_cast<T>(static_cast<const int32_t*>(data)[i]);
    case DType::i64:
      return static_cast<T>(static_cast<const int64_t*>(data)[i]);
    default:
      return load_float<T>(data, dtype, i);
  }
}

// Tells the compiler that it is none of the whole numbers'.
FASTVAE_INLINE DType floating(DType dtype) {
  return dtype == DType::f64    ? DType::f64
         : dtype == DType::bf16 ? DType::bf16
         : dtype == DType::f16  ? DType::f16
                                : DType::f32;
}

FASTVAE_INLINE int itemsize(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16:
      return 2;
    default:
      return 1;
  }
}

template <class T>
FASTVAE_INLINE void store_one(void* data, DType dtype, int64_t i, T value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      break;
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(static_cast<float>(value));
      break;
    case DType::f16:
      static_cast<__half*>(data)[i] = __float2half(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// A thread's neighbours, as they lie in memory: fetched first and understood later, so that several
// loads are under way at once.
template <class T>
class Fetched {
  static constexpr int W = width<T>;

 public:
  // Elements [col, col + n) of a row.
  FASTVAE_INLINE void fetch(const Source& in, DType dtype, int64_t row, int64_t col, int n) {
    const int64_t first = row_of(row, in.period) * in.row_stride + col * in.col_stride;
    const bool vector = in.vectors && n == W;
    repeated_ = in.col_stride == 0;  // read once
    dtype_ = dtype;
    const int count = repeated_ ? 1 : n;
    switch (itemsize(dtype)) {
      case 1: {
        const auto* p = static_cast<const uint8_t*>(in.data) + first;
        if (vector)
          word_[0] = W == 4 ? *reinterpret_cast<const uint32_t*>(p)
                            : *reinterpret_cast<const uint16_t*>(p);
        else
          word_[0] = gather(p, in.col_stride, count, 0);
        break;
      }
      case 2: {
        const auto* p = static_cast<const uint16_t*>(in.data) + first;
        if (vector && W == 4) {
          const uint2 v = *reinterpret_cast<const uint2*>(p);
          word_[0] = v.x, word_[1] = v.y;
        } else if (vector) {
          word_[0] = *reinterpret_cast<const uint32_t*>(p);
        } else {
          word_[0] = gather(p, in.col_stride, count, 0);
          word_[1] = gather(p, in.col_stride, count, 2);
        }
        break;
      }
      case 4: {
        const auto* p = static_cast<const uint32_t*>(in.data) + first;
        if (vector && W == 4) {
          const uint4 v = *reinterpret_cast<const uint4*>(p);
          word_[0] = v.x, word_[1] = v.y, word_[2] = v.z, word_[3] = v.w;
        } else {
#pragma unroll
          for (int e = 0; e < W; ++e) word_[e] = e < count ? p[e * in.col_stride] : 0;
        }
        break;
      }
      default: {
        const auto* p = static_cast<const uint64_t*>(in.data) + first;
        if (vector && W == 2) {
          const uint4 v = *reinterpret_cast<const uint4*>(p);
          word_[0] = v.x, word_[1] = v.y, word_[2] = v.z, word_[3] = v.w;
          break;
        }
#pragma unroll
        for (int e = 0; e < W; ++e) {
          const uint64_t bits = e < count ? p[e * in.col_stride] : 0;
          if (W == 2) {
            word_[2 * e] = static_cast<uint32_t>(bits);
            word_[2 * e + 1] = static_cast<uint32_t>(bits >> 32);
          } else {  // four of them don't fit: they are understood at once
            const auto value = dtype == DType::f64 ? static_cast<float>(__longlong_as_double(bits))
                                                   : static_cast<float>(static_cast<int64_t>(bits));
            word_[e] = __float_as_uint(value);
          }
        }
        if (W == 4) dtype_ = DType::f32;
      }
    }
  }

  FASTVAE_INLINE void understand(T (&value)[W]) const {
#pragma unroll
    for (int e = 0; e < W; ++e) {
      value[e] = one(e);
      if (repeated_) value[e] = value[0];
    }
  }

 private:
  FASTVAE_INLINE T one(int e) const {
    const uint32_t half = word_[e / 2] >> (e % 2 * 16), byte = word_[0] >> (e * 8);
    const uint32_t low = word_[W == 2 ? 2 * e : 0], high = word_[W == 2 ? 2 * e + 1 : 0];
    switch (dtype_) {
      case DType::f64:
        return static_cast<T>(__hiloint2double(high, low));
      case DType::i64:
        return static_cast<T>(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
      case DType::i32:
        return static_cast<T>(static_cast<int32_t>(word_[e]));
      case DType::bf16:
        return static_cast<T>(__uint_as_float(half << 16));
      case DType::f16:
        return static_cast<T>(__half2float(__ushort_as_half(half & 0xffff)));
      case DType::i16:
        return static_cast<T>(static_cast<int16_t>(half));
      case DType::i8:
        return static_cast<T>(static_cast<int8_t>(byte));
      case DType::u8:
        return static_cast<T>(byte & 0xff);
      default:
        return static_cast<T>(__uint_as_float(word_[e]));
    }
  }

  // As many elements as fit a word, from the one at `begin`.
  template <class U>
  static FASTVAE_INLINE uint32_t gather(const U* p, int64_t stride, int count, int begin) {
    constexpr int fit = 4 / sizeof(U);
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < fit; ++e)
      if (begin + e < count)
        bits |= static_cast<uint32_t>(p[(begin + e) * stride]) << (8 * sizeof(U) * e);
    return bits;
  }

  uint32_t word_[4];
  DType dtype_;
  bool repeated_;
};

template <class T>
FASTVAE_INLINE void store(const Target& out, int64_t i, int n, const T (&value)[width<T>]) {
  constexpr int W = width<T>;
  if (out.vectors && n == W) {
    if constexpr (sizeof(T) == 8) {
      if (out.dtype == DType::f64) {
        auto* to = static_cast<double*>(out.data) + i;
        *reinterpret_cast<double2*>(to) = make_double2(value[0], value[1]);
        return;
      }
    } else {
      if (out.dtype == DType::f32) {
        auto* to = static_cast<float*>(out.data) + i;
        *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
        return;
      }
      uint2 both;
      if (out.dtype == DType::bf16) {
        const auto a = __floats2bfloat162_rn(value[0], value[1]);
        const auto b = __floats2bfloat162_rn(value[2], value[3]);
        both =
            make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.data) + i) = both;
        return;
      }
      if (out.dtype == DType::f16) {
        const auto a = __floats2half2_rn(value[0], value[1]);
        const auto b = __floats2half2_rn(value[2], value[3]);
        both =
            make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.data) + i) = both;
        return;
      }
    }
  }
#pragma unroll
  for (int p = 0; p < W; ++p)
    if (p < n) store_one(out.data, out.dtype, i + p, value[p]);
}

// The sum over groups of `lanes` neighbouring threads, a power of two; right in the first thread of
// each. All threads of the block take part.
template <class T>
FASTVAE_INLINE T sum_group(T value, int lanes) {
  for (int step = (lanes < 32 ? lanes : 32) / 2; step > 0; step /= 2)
    value += __shfl_down_sync(0xffffffffu, value, step, 32);
  if (lanes <= 32) return value;
  __shared__ T of_warp[block_threads / 32];
  __syncthreads();  // what an earlier sum read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x % lanes == 0) {
    value = T(0);
    for (int w = 0; w < lanes / 32; ++w) value += of_warp[threadIdx.x / 32 + w];
  }
  return value;
}

// This thread's place in the work that `split` deals out.
struct Place {
  int64_t row, split, first, end;
  int lane;
  bool exists;

  FASTVAE_INLINE Place(const cuda::Split& s, int64_t rows, int64_t cols, int per_thread) {
    const int groups = block_threads / s.lanes;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / s.lanes;
    lane = static_cast<int>(threadIdx.x) % s.lanes;
    row = s.splits == 1 ? unit : unit / s.splits;
    split = unit - row * s.splits;
    exists = row < rows;
    first = split * s.chunk + lane * per_thread;
    end = exists ? (cols < (split + 1) * s.chunk ? cols : (split + 1) * s.chunk) : 0;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
