// The only loop over elements of a likelihood: load, formula, mask, reduce along the row, store.
//
// A row is taken in tiles that fit the L1 cache. Inputs in the compute type or in half precision
// are read where they lie; others (uint8, a constant per row, float32 for float64) are staged in a
// tile-sized buffer, so that one instantiation per formula and compute type serves every dtype.
#pragma once

#include <ATen/Parallel.h>

#include "element.h"

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

// Calls body(i, count) for each vector of [0, n). The count is a constant but for the last one,
// which may be partial.
template <class T, class Body>
FASTVAE_INLINE void for_vectors(int64_t n, Body&& body) {
  constexpr int64_t width = Vec<T>::size();
  const int64_t whole = n - n % width;
  for (int64_t i = 0; i < whole; i += width) body(i, std::integral_constant<int64_t, width>{});
  if (whole < n) body(whole, n - whole);
}

// Elements [col, col + n) of row `row`, where they lie if a vector of them can be read as T, else
// converted to `buffer`.
template <class T>
inline Source<T> source_tile(const Operand& x, int64_t row, int64_t col, int64_t n, T* buffer) {
  const int64_t start = (row % x.period) * x.row_stride + (x.per_row ? 0 : col);
  Source<T> tile{buffer, dtype_of<T>};
  with_dtype(x.dtype, [&](auto s) {
    using S = decltype(s);
    const S* source = static_cast<const S*>(x.data) + start;
    if (x.per_row)
      std::fill_n(buffer, n, static_cast<T>(*source));
    else if (reads<T>(x.dtype))
      tile = {source, x.dtype};
    else
      at::vec::convert<S, T>(source, buffer, n);
  });
  return tile;
}

// The same in the compute type: in place where possible, else in `buffer`.
template <class T>
inline const T* load_tile(const Operand& x, int64_t row, int64_t col, int64_t n, T* buffer) {
  const Source<T> source = source_tile(x, row, col, n, buffer);
  if (source.dtype == dtype_of<T>) return static_cast<const T*>(source.data);
  for_vectors<T>(n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    source.read(i, count).store(buffer + i, count);
  });
  return buffer;
}

// Where a tile of an output is written: in place where vectors can be, else in `buffer` until
// store_tile() converts it.
template <class T>
inline Sink<T> sink_tile(const Output& y, int64_t start, T* buffer) {
  Sink<T> tile{buffer, dtype_of<T>};
  with_dtype(y.dtype, [&](auto s) {
    if (writes<T>(y.dtype)) tile = {static_cast<decltype(s)*>(y.data) + start, y.dtype};
  });
  return tile;
}

template <class T>
inline void store_tile(const Output& y, int64_t start, int64_t n, const T* values) {
  if (writes<T>(y.dtype)) return;
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
inline bool in_unit(const Source<T>& x, int64_t n, const T* mask) {
  for (int64_t i = 0; i < n; ++i) {
    const T v = x.value(i);
    if (!(v >= T(0) && v <= T(1)) && !(mask && mask[i] == T(0))) return false;
  }
  return true;
}

// One tile: returns Σ value, writes scale · gradient where grad[j] is wanted, flags inputs outside
// their domain. A partial vector is loaded with zeros behind it, which lie in every domain; what it
// adds to the sum is cut off.
template <class F, class T, bool Grad, bool Masked>
inline double formula_tile(const Source<T> (&in)[F::inputs], const T* mask,
                           const Sink<T> (&grad)[F::inputs], int64_t n, const Vec<T>* options,
                           T scale, unsigned& outside) {
  using V = Vec<T>;
  const V zero(T(0)), factor(scale);
  constexpr unsigned unit_inputs = units<F>();
  InUnit<V> inside[F::inputs];
  Source<T> from[F::inputs];  // copies: a store of floats could change what `in` refers to
  Sink<T> to[F::inputs];
  std::copy_n(in, F::inputs, from);
  std::copy_n(grad, F::inputs, to);

  const double total =
      sum_vectors<T>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
        V x[F::inputs];
        Mask<V> drop;
        for (int j = 0; j < F::inputs; ++j) x[j] = from[j].read(i, count);
        for (int j = 0; j < F::inputs; ++j) from[j].prefetch(i + ahead);
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
            if (!to[j].data) continue;
            V g = factor * r.grad[j];
            if constexpr (Masked) g = select(drop, zero, g);
            to[j].write(g, i, count);
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
    T weight;
    if (Grad && a.weight.data) scale *= *load_tile(a.weight, row, 0, 1, &weight);
    double sums[1 + max_inputs] = {};
    for (int64_t col = first; col < last; col += tile) {
      const int64_t n = std::min(tile, last - col), start = row * a.cols + col;
      Source<T> in[F::inputs];
      Sink<T> grad[F::inputs];
      for (int j = 0; j < F::inputs; ++j) {
        in[j] = source_tile(a.in[j], row, col, n, in_buffer[j]);
        if (!Grad) continue;
        if (a.sum_grad[j]) grad[j].data = grad_buffer[j];
        if (a.grad[j].data) grad[j] = sink_tile(a.grad[j], start, grad_buffer[j]);
      }
      const T* mask = Masked ? load_tile(a.mask, row, col, n, mask_buffer) : nullptr;
      sums[0] += formula_tile<F, T, Grad, Masked>(in, mask, grad, n, options, static_cast<T>(scale),
                                                  outside);
      for (int j = 0; Grad && j < F::inputs; ++j) {
        if (a.sum_grad[j])
          sums[1 + j] += sum_of(grad_buffer[j], n);
        else if (grad[j].data)
          store_tile(a.grad[j], start, n, grad_buffer[j]);
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
