// A piece of a matrix that fits the L1 cache, and how operands get into it and outputs out of it.
#pragma once

#include "groups.h"
#include "kernels.h"

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
    case DType::i8:
      return fn(int8_t{});
    case DType::i16:
      return fn(int16_t{});
    case DType::i32:
      return fn(int32_t{});
    case DType::i64:
      return fn(int64_t{});
  }
}

template <class T>
constexpr DType dtype_v = std::is_same_v<T, double>  ? DType::f64
                          : std::is_same_v<T, float> ? DType::f32
                                                     : DType::bf16;

// buffer = source in the compute type. ATen's own conversion is scalar from 16-bit types.
template <class T, class S>
inline void widen(const S* source, int64_t n, T* buffer) {
  int64_t i = 0;
#if !defined(FASTVAE_GENERIC)  // where the compiler makes vectors of the loops below
  constexpr bool bf16 = std::is_same_v<S, c10::BFloat16>, f16 = std::is_same_v<S, c10::Half>;
  if constexpr (std::is_same_v<T, float> && (bf16 || f16)) {
    for (; i + F32::size() <= n; i += F32::size()) {
      F32 v;
      __builtin_prefetch(source + i + tile, 0, 2);  // the next tile, with a formula in between
      if constexpr (bf16)
        at::vec::load_fp32_from_bf16(source + i, v);
      else
        at::vec::load_fp32_from_fp16(source + i, v);
      v.store(buffer + i);
    }
  }
#endif
  if constexpr (std::is_integral_v<S>)
    for (; i < n; ++i) buffer[i] = static_cast<T>(source[i]);
  else
    at::vec::convert<S, T>(source + i, buffer + i, n - i);
}

// Columns [col, col + cols) of `rows` rows from `row` on, one behind the other. More than one row
// only where they are whole.
struct Tile {
  int64_t row, rows, col, cols;
  int64_t size() const { return rows * cols; }
};

// Whether the tile's elements lie end to end in the operand.
inline bool end_to_end(const Operand& x, const Tile& t) {
  const bool rows =
      t.rows == 1 || (x.row_stride == t.cols && t.row % x.period + t.rows <= x.period);
  return rows && (x.col_stride == 1 || t.cols == 1);
}

// buffer = the tile, whose first row begins at `data`'s row t.row mod period. Of short or stepping
// rows one column of all of them at a time: a loop over three elements costs more than they do.
template <class T, class S>
inline void gather(const Operand& x, const S* data, const Tile& t, T* buffer) {
  const auto each_row = [&](auto&& body) {
    for (int64_t r = 0, from = t.row % x.period; r < t.rows; ++r) {
      body(r, data + from * x.row_stride + t.col * x.col_stride);
      if (++from == x.period) from = 0;
    }
  };
  if (t.cols < 8 || x.col_stride > 1)
    for (int64_t c = 0; c < t.cols; ++c)
      each_row([&](int64_t r, const S* row) {
        buffer[r * t.cols + c] = static_cast<T>(row[c * x.col_stride]);
      });
  else if (x.col_stride == 0)
    each_row([&](int64_t r, const S* row) {
      std::fill_n(buffer + r * t.cols, t.cols, static_cast<T>(*row));
    });
  else
    each_row([&](int64_t r, const S* row) { widen(row, t.cols, buffer + r * t.cols); });
}

// The tile of an operand as T: in place where possible, else in `buffer`.
template <class T>
inline const T* load_tile(const Operand& x, const Tile& t, T* buffer) {
  const bool whole = end_to_end(x, t);
  const int64_t first = t.row % x.period * x.row_stride + t.col * x.col_stride;
  if (whole && x.dtype == dtype_v<T>) return static_cast<const T*>(x.data) + first;
  if constexpr (std::is_floating_point_v<T>) {
    with_dtype(x.dtype, [&](auto s) {
      const auto* data = static_cast<const decltype(s)*>(x.data);
      whole ? widen(data + first, t.size(), buffer) : gather(x, data, t, buffer);
    });
  }
  return buffer;
}

// Where a tile of an output is written: in place, or in `buffer` until store_tile converts it.
template <class T>
inline T* output_tile(const Output& y, int64_t start, T* buffer) {
  return y.dtype == dtype_v<T> ? static_cast<T*>(y.data) + start : buffer;
}

template <class T>
inline void store_tile(const Output& y, int64_t start, int64_t n, const T* values) {
  if constexpr (std::is_floating_point_v<T>) {
    if (y.dtype == dtype_v<T>) return;
    with_dtype(y.dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (!std::is_integral_v<S>)  // no gradient is
        at::vec::convert<T, S>(values, static_cast<S*>(y.data) + start, n);
    });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
