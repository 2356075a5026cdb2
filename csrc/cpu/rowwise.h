// The only loop over elements of a likelihood: load, formula, mask, reduce along the row, store.
//
// A row is taken in tiles that fit the L1 cache. Inputs already in the compute type are read where
// they lie; others (half precision, uint8, a constant per row) are staged in a tile-sized buffer,
// so that one instantiation per formula and compute type serves every dtype.
#pragma once

#include <ATen/Parallel.h>

#include "kernels.h"
#include "vec.h"

#include "../formulas/all.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

constexpr int64_t tile = 1024;
static_assert(row_chunk % tile == 0);
// How many elements ahead inputs are fetched: the hardware's prefetcher stops at each page's end.
constexpr int64_t ahead = 512;
// Elements below which a second thread costs more than it brings (about 5 µs to wake one).
constexpr int64_t grain_elements = 8192;

inline int64_t grain(int64_t elements_per_unit) {
  return elements_per_unit >= grain_elements ? 1 : grain_elements / (elements_per_unit + 1) + 1;
}

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

// buffer = source in the compute type. ATen's own conversion is scalar from 16-bit types.
template <class T, class S>
inline void widen(const S* source, int64_t n, T* buffer) {
  constexpr bool bf16 = std::is_same_v<S, c10::BFloat16>, f16 = std::is_same_v<S, c10::Half>;
  int64_t i = 0;
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
  at::vec::convert<S, T>(source + i, buffer + i, n - i);
}

// Calls body(i, count) for each vector of [0, n). The count is a constant but for the last one,
// which may be partial.
template <class T, class Body>
FASTVAE_INLINE void for_vectors(int64_t n, Body&& body) {
  constexpr int64_t width = Vec<T>::size();
  const int64_t whole = n - n % width;
  for (int64_t i = 0; i < whole; i += width) body(i, std::integral_constant<int64_t, width>{});
  if (whole < n) body(whole, n - whole);
}

// Elements [col, col + n) of row `row` in the compute type: in place where possible, else in
// `buffer`.
template <class T>
inline const T* load_tile(const Operand& x, int64_t row, int64_t col, int64_t n, T* buffer) {
  const int64_t start = (row % x.period) * x.row_stride + (x.per_row ? 0 : col);
  if (x.dtype == dtype_of<T> && !x.per_row) return static_cast<const T*>(x.data) + start;
  with_dtype(x.dtype, [&](auto s) {
    using S = decltype(s);
    const S* source = static_cast<const S*>(x.data) + start;
    if (x.per_row) {
      const T value = static_cast<T>(*source);
      for (int64_t i = 0; i < n; ++i) buffer[i] = value;
    } else {
      widen(source, n, buffer);
    }
  });
  return buffer;
}

// Where a tile of an output is written: in place, or in `buffer` until store_tile converts it.
template <class T>
inline T* output_tile(const Output& y, int64_t start, T* buffer) {
  return y.dtype == dtype_of<T> ? static_cast<T*>(y.data) + start : buffer;
}

template <class T>
inline void store_tile(const Output& y, int64_t start, int64_t n, const T* values) {
  if (y.dtype == dtype_of<T>) return;
  with_dtype(y.dtype, [&](auto s) {
    using S = decltype(s);
    at::vec::convert<T, S>(values, static_cast<S*>(y.data) + start, n);
  });
}

// Sums vectors: at most 32 of them in the compute type, then in double lanes, in a fixed order.
template <class T>
class Sum {
  using V = Vec<T>;
  static constexpr int64_t width = V::size();

 public:
  // Elements that may be added before a flush(), and before a flush_odds(): the product of 96
  // factors in [1, 2] is finite, and a logarithm costs as much as three vectors of the formula.
  static constexpr int64_t run = 32 * width, odds_run = 3 * run;

  FASTVAE_INLINE void add(const V& v) { sum_ = sum_ + v; }
  // Subtracts ln(1 + odds): 1 + odds multiplies a product, of which only what exceeds 1 is kept,
  // for then small odds lose nothing.
  FASTVAE_INLINE void subtract_log1p(const V& odds) {
    odds_ = fmadd(odds_, V(T(1)) + odds, odds);
    any_odds_ = true;
  }
  FASTVAE_INLINE void flush() {
    add_wide(sum_, wide_);
    sum_ = V(T(0));
  }
  FASTVAE_INLINE void flush_odds() {
    if (any_odds_) add_wide(-log1p(odds_), wide_);
    odds_ = V(T(0));
  }
  double total() const {
    F64 sum = wide_[0];
    if constexpr (width > F64::size()) sum = sum + wide_[1];
    double lanes[F64::size()];
    sum.store(lanes);
    for (int half = F64::size() / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
  }

 private:
  V sum_{T(0)}, odds_{T(0)};
  bool any_odds_ = false;  // known at compile time once the loop is inlined
  F64 wide_[width / F64::size()] = {};
};

// Like for_vectors, with a Sum as third argument, whose total is returned.
template <class T, class Body>
FASTVAE_INLINE double sum_vectors(int64_t n, Body&& body) {
  Sum<T> sum;
  for (int64_t first = 0; first < n;) {
    for (const int64_t end = std::min(n, first + Sum<T>::odds_run); first < end;
         first += Sum<T>::run) {
      for_vectors<T>(std::min(end - first, Sum<T>::run),
                     [&](int64_t i, auto count)
                         __attribute__((always_inline)) { body(first + i, count, sum); });
      sum.flush();
    }
    sum.flush_odds();
  }
  return sum.total();
}

template <class T>
inline double sum_of(const T* values, int64_t n) {
  return sum_vectors<T>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
    sum.add(Vec<T>::loadu(values + i, count));
  });
}

// Bit j: input j must be in [0, 1]. Read at compile time only, so that no instruction set's object
// holds a copy of F::domain that the linker could give to the others.
template <class F>
consteval unsigned units() {
  unsigned bits = 0;
  for (int j = 0; j < F::inputs; ++j) bits |= (F::domain[j] == Domain::unit ? 1u : 0u) << j;
  return bits;
}

// Whether all n values are in [0, 1].
template <class T>
inline bool in_unit(const T* x, int64_t n, const T* mask) {
  for (int64_t i = 0; i < n; ++i)
    if (!(x[i] >= T(0) && x[i] <= T(1)) && !(mask && mask[i] == T(0))) return false;
  return true;
}

// One tile: returns Σ value, writes scale · gradient where grad[j] is wanted, flags inputs outside
// their domain. A partial vector is loaded with zeros behind it, which lie in every domain; what it
// adds to the sum is cut off.
template <class F, class T, bool Grad, bool Masked>
inline double formula_tile(const T* const (&in)[F::inputs], const T* mask,
                           T* const (&grad)[F::inputs], int64_t n, const Vec<T>* options, T scale,
                           unsigned& outside) {
  using V = Vec<T>;
  const V zero(T(0)), factor(scale);
  constexpr unsigned unit_inputs = units<F>();
  InUnit<V> inside[F::inputs];
  const T* from[F::inputs];  // copies: a store of floats could change what `in` refers to
  T* to[F::inputs];
  std::copy_n(in, F::inputs, from);
  std::copy_n(grad, F::inputs, to);

  const double total =
      sum_vectors<T>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
        V x[F::inputs];
        Mask<V> drop;
        for (int j = 0; j < F::inputs; ++j) x[j] = V::loadu(from[j] + i, count);
        for (int j = 0; j < F::inputs; ++j) __builtin_prefetch(from[j] + i + ahead, 0, 2);
        if constexpr (Masked) {  // zeroed before the formula for the domain's sake, after it for
                                 // the value's
          drop = equal(V::loadu(mask + i, count), zero);
          for (V& v : x) v = select(drop, zero, v);
        }
        for (int j = 0; j < F::inputs; ++j)
          if (unit_inputs >> j & 1) inside[j].add(x[j]);
        const auto r = F::template eval<V>(x, options);
        if constexpr (Grad) {
          for (int j = 0; j < F::inputs; ++j) {
            if (!to[j]) continue;
            V g = factor * r.grad[j];
            if constexpr (Masked) g = select(drop, zero, g);
            g.store(to[j] + i, count);
          }
        }
        V value = r.value, odds = r.odds;
        if constexpr (Masked) value = select(drop, zero, value), odds = select(drop, zero, odds);
        if constexpr (std::is_same_v<decltype(count), int64_t>)
          value = V::set(zero, value, count), odds = V::set(zero, odds, count);
        sum.add(value);
        if constexpr (requires { F::log_odds; }) sum.subtract_log1p(odds);
      });

  for (int j = 0; j < F::inputs; ++j)
    if (unit_inputs >> j & 1 && !inside[j].all() && !in_unit(in[j], n, mask)) outside |= 1u << j;
  return total;
}

template <class F, class T, bool Grad, bool Masked>
inline void rowwise_range(const RowwiseArgs& a, int64_t begin, int64_t end, unsigned& outside) {
  using V = Vec<T>;
  const int64_t per_row = chunks(a.cols);
  alignas(64) T in_buffer[F::inputs][tile];
  alignas(64) T grad_buffer[F::inputs][tile];
  alignas(64) T mask_buffer[tile];
  V options[max_options];
  for (int k = 0; k < max_options; ++k) options[k] = num<V>(a.options[k]);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / per_row, first = unit % per_row * row_chunk;
    const int64_t last = std::min(a.cols, first + row_chunk);
    double scale = a.scale;
    T weight{};
    if (Grad && a.weight.data) scale *= *load_tile(a.weight, row, 0, 1, &weight);
    double sums[1 + max_inputs] = {};
    for (int64_t col = first; col < last; col += tile) {
      const int64_t n = std::min(tile, last - col), start = row * a.cols + col;
      const T* in[F::inputs];
      T* grad[F::inputs] = {};
      for (int j = 0; j < F::inputs; ++j) {
        in[j] = load_tile(a.in[j], row, col, n, in_buffer[j]);
        if (!Grad) continue;
        if (a.sum_grad[j]) grad[j] = grad_buffer[j];
        if (a.grad[j].data) grad[j] = output_tile(a.grad[j], start, grad_buffer[j]);
      }
      const T* mask = Masked ? load_tile(a.mask, row, col, n, mask_buffer) : nullptr;
      sums[0] += formula_tile<F, T, Grad, Masked>(in, mask, grad, n, options, static_cast<T>(scale),
                                                  outside);
      for (int j = 0; Grad && j < F::inputs; ++j) {
        if (!grad[j]) continue;
        if (a.sum_grad[j])
          sums[1 + j] += sum_of(grad[j], n);
        else
          store_tile(a.grad[j], start, n, grad[j]);
      }
    }
    std::memcpy(a.sums + unit * (1 + max_inputs), sums, sizeof sums);
  }
}

template <class F, class T>
inline void rowwise_formula(const RowwiseArgs& a) {
  const int64_t units = a.rows * chunks(a.cols);
  at::parallel_for(0, units, grain(std::min(a.cols, row_chunk)), [&](int64_t begin, int64_t end) {
    unsigned outside = 0;
    if (a.mask.data)
      a.want_grad ? rowwise_range<F, T, true, true>(a, begin, end, outside)
                  : rowwise_range<F, T, false, true>(a, begin, end, outside);
    else
      a.want_grad ? rowwise_range<F, T, true, false>(a, begin, end, outside)
                  : rowwise_range<F, T, false, false>(a, begin, end, outside);
    if (outside) __atomic_fetch_or(a.outside, outside, __ATOMIC_RELAXED);
  });
}

inline void rowwise(const RowwiseArgs& a) {
  with_formula(a.family, [&](auto formula) {
    using F = decltype(formula);
    a.use_double ? rowwise_formula<F, double>(a) : rowwise_formula<F, float>(a);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
