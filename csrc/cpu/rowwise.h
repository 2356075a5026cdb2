// The only loop over elements of a likelihood: load, formula, mask, reduce along the row, store.
//
// A row is taken in tiles that fit the L1 cache. Inputs in the compute type, and parameters in
// bfloat16, are read where they lie; others (float16, uint8, a constant per row) are staged in a
// tile-sized buffer, so that few instantiations serve every dtype.
#pragma once

#include "groups.h"
#include "kernels.h"
#include "parallel.h"

#include "../formulas/all.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

constexpr int64_t tile = 1024;
static_assert(row_chunk % tile == 0);
// How many elements ahead inputs are fetched: the hardware's prefetcher stops at each page's end.
constexpr int64_t ahead = 512;

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
constexpr DType dtype_of = std::is_same_v<T, double>  ? DType::f64
                           : std::is_same_v<T, float> ? DType::f32
                                                      : DType::bf16;

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
template <class T, class S = T, class Body>
FASTVAE_INLINE void for_vectors(int64_t n, Body&& body) {
  constexpr int64_t width = parts<T, S> * Vec<T>::size();
  const int64_t whole = n - n % width;
  for (int64_t i = 0; i < whole; i += width) body(i, std::integral_constant<int64_t, width>{});
  if (whole < n) body(whole, n - whole);
}

// Elements [col, col + n) of row `row` as T: in place where possible, else in `buffer`.
template <class T>
inline const T* load_tile(const Operand& x, int64_t row, int64_t col, int64_t n, T* buffer) {
  const int64_t start = (row % x.period) * x.row_stride + (x.per_row ? 0 : col);
  if (x.dtype == dtype_of<T> && !x.per_row) return static_cast<const T*>(x.data) + start;
  if constexpr (std::is_floating_point_v<T>) {
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
  }
  return buffer;
}

// Where a tile of an output is written: in place, or in `buffer` until store_tile converts it.
template <class T>
inline T* output_tile(const Output& y, int64_t start, T* buffer) {
  return y.dtype == dtype_of<T> ? static_cast<T*>(y.data) + start : buffer;
}

template <class T>
inline void store_tile(const Output& y, int64_t start, int64_t n, const T* values) {
  if constexpr (std::is_floating_point_v<T>) {
    if (y.dtype == dtype_of<T>) return;
    with_dtype(y.dtype, [&](auto s) {
      using S = decltype(s);
      at::vec::convert<T, S>(values, static_cast<S*>(y.data) + start, n);
    });
  }
}

// Sums vectors: at most 32 of them in the compute type, then in double lanes, in a fixed order.
template <class T>
class Sum {
  using V = Vec<T>;
  static constexpr int64_t width = V::size();

 public:
  Sum() {  // before torch 2.9 a Vectorized() is not zero
    for (F64& w : wide_) w = F64(0.0);
  }
  // Elements that may be added before a flush(), and before a flush_odds(): the product of 126
  // factors in [1, 2] is finite, and a logarithm costs as much as three vectors of the formula.
  static constexpr int64_t run = 32 * width, odds_run = 126 * width;

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
  F64 wide_[width / F64::size()];
};

// Like for_vectors, with a Sum as third argument, whose total is returned.
template <class T, class S = T, class Body>
FASTVAE_INLINE double sum_vectors(int64_t n, Body&& body) {
  Sum<T> sum;
  for (int64_t first = 0; first < n;) {
    for (const int64_t end = std::min(n, first + Sum<T>::odds_run); first < end;) {
      const int64_t count = std::min(end - first, Sum<T>::run);
      for_vectors<T, S>(count, [&](int64_t i, auto size)
                                   __attribute__((always_inline)) { body(first + i, size, sum); });
      sum.flush();
      first += count;
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
template <class T, class S>
inline bool in_unit(const S* x, int64_t n, const T* mask) {
  for (int64_t i = 0; i < n; ++i)
    if (!(x[i] >= S(0) && x[i] <= S(1)) && !(mask && mask[i] == T(0))) return false;
  return true;
}

// Where a tile's inputs and wanted gradients are; others are null. The first parameter is param[1],
// as in a formula's list of inputs.
template <class F, class X, class S>
struct Pointers {
  const X* x;
  X* dx;
  const S* param[F::inputs];
  S* dparam[F::inputs];
};

// One tile: returns Σ value, writes scale · gradient where grad[j] is wanted, flags inputs outside
// their domain. A partial vector is loaded with zeros behind it, which lie in every domain; what it
// adds to the sum is cut off.
template <class F, class T, class X, class S, bool Grad, bool Masked>
inline double formula_tile(const Pointers<F, X, S>& t, const T* mask, int64_t n,
                           const Vec<T>* options, T scale, unsigned& outside) {
  using V = Vec<T>;
  constexpr int P = parts<T, S>;
  const V zero(T(0)), factor(scale);
  constexpr unsigned unit_inputs = units<F>();
  InUnit<V> inside[F::inputs];
  const Pointers<F, X, S> here = t;  // a copy: a store of floats could change what `t` refers to

  const double total =
      sum_vectors<T, S>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
        V in[F::inputs][P], grad[F::inputs][P];
        load(here.x + i, count, in[0]);
        for (int j = 1; j < F::inputs; ++j) load(here.param[j] + i, count, in[j]);
        __builtin_prefetch(here.x + i + ahead, 0, 2);
        for (int j = 1; j < F::inputs; ++j) __builtin_prefetch(here.param[j] + i + ahead, 0, 2);
        Mask<V> drop;
        if constexpr (Masked) drop = equal(V::loadu(mask + i, count), zero);
        for (int p = 0; p < P; ++p) {
          V v[F::inputs];
          for (int j = 0; j < F::inputs; ++j) {
            v[j] = in[j][p];
            // Zeroed before the formula for the domain's sake, after it for the value's.
            if constexpr (Masked) v[j] = select(drop, zero, v[j]);
            if (unit_inputs >> j & 1) inside[j].add(v[j]);
          }
          const auto r = F::template eval<V>(v, options);
          for (int j = 0; j < F::inputs; ++j) grad[j][p] = r.grad[j];
          V value = r.value, odds = r.odds;
          if constexpr (Masked) value = select(drop, zero, value), odds = select(drop, zero, odds);
          if constexpr (std::is_same_v<decltype(count), int64_t>) {
            const int64_t some = in_part<P>(count, p);
            value = V::set(zero, value, some), odds = V::set(zero, odds, some);
          }
          sum.add(value);
          if constexpr (requires { F::log_odds; }) sum.subtract_log1p(odds);
        }
        for (int j = 0; Grad && j < F::inputs; ++j) {
          if (!(j == 0 ? static_cast<const void*>(here.dx) : here.dparam[j])) continue;
          for (V& v : grad[j]) {
            v = factor * v;
            if constexpr (Masked) v = select(drop, zero, v);
          }
          j == 0 ? store(grad[j], here.dx + i, count) : store(grad[j], here.dparam[j] + i, count);
        }
      });

  for (int j = 0; j < F::inputs; ++j)
    if (unit_inputs >> j & 1 && !inside[j].all() &&
        !(j == 0 ? in_unit(t.x, n, mask) : in_unit(t.param[j], n, mask)))
      outside |= 1u << j;
  return total;
}

template <class S>
inline S* gradient_tile(const RowwiseArgs& a, int j, int64_t start, S* buffer) {
  if (a.sum_grad[j]) return buffer;
  return a.grad[j].data ? output_tile(a.grad[j], start, buffer) : nullptr;
}

// Units [begin, end). X is how x and its gradient are read and written, S how the parameters and
// theirs: T, then staged where they are something else, or bfloat16.
template <class F, class T, class X, class S, bool Grad, bool Masked>
inline void rowwise_range(const RowwiseArgs& a, int64_t begin, int64_t end, unsigned& outside) {
  using V = Vec<T>;
  const int64_t per_row = chunks(a.cols);
  alignas(64) X x_buffer[tile], dx_buffer[tile];
  alignas(64) S buffer[F::inputs - 1][tile], grad_buffer[F::inputs - 1][tile];
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
      const T* mask = Masked ? load_tile(a.mask, row, col, n, mask_buffer) : nullptr;
      Pointers<F, X, S> t{};
      t.x = load_tile(a.in[0], row, col, n, x_buffer);
      if (Grad) t.dx = gradient_tile(a, 0, start, dx_buffer);
      for (int j = 1; j < F::inputs; ++j) {
        t.param[j] = load_tile(a.in[j], row, col, n, buffer[j - 1]);
        if (Grad) t.dparam[j] = gradient_tile(a, j, start, grad_buffer[j - 1]);
      }
      sums[0] += formula_tile<F, T, X, S, Grad, Masked>(t, mask, n, options, static_cast<T>(scale),
                                                        outside);
      if (Grad && scale == 0) {  // not 0 · ∞: β may be 0 where the KL is infinite
        if (t.dx) std::fill_n(t.dx, n, X(0));
        for (int j = 1; j < F::inputs; ++j)
          if (t.dparam[j]) std::fill_n(t.dparam[j], n, S(0));
      }
      if (Grad && t.dx) store_tile(a.grad[0], start, n, t.dx);
      for (int j = 1; Grad && j < F::inputs; ++j) {
        if (!t.dparam[j]) continue;
        if constexpr (std::is_same_v<S, T>)
          if (a.sum_grad[j]) {
            sums[1 + j] += sum_of(t.dparam[j], n);
            continue;
          }
        store_tile(a.grad[j], start, n, t.dparam[j]);
      }
    }
    std::memcpy(a.sums + unit * (1 + max_inputs), sums, sizeof sums);
  }
}

// Whether the parameters and their gradients are dense and of that dtype.
template <class F>
inline bool params_are(DType dtype, const RowwiseArgs& a) {
  for (int j = 1; j < F::inputs; ++j)
    if (a.in[j].dtype != dtype || a.in[j].per_row || a.sum_grad[j]) return false;
  return true;
}

template <class F, class T, class X, class S, bool Masked>
inline void rowwise_stored(const RowwiseArgs& a) {
  // The loop with gradients writes none where none is wanted. The one without, a second of
  // compiling for each formula, is made for the common case alone.
  auto range = rowwise_range<F, T, X, S, true, Masked>;
  if constexpr (std::is_same_v<T, float> && !Masked)
    if (!a.want_grad) range = rowwise_range<F, T, X, S, false, Masked>;
  parallel_units(a.rows * chunks(a.cols), std::min(a.cols, row_chunk), [&](auto&& ranges) {
    unsigned outside = 0;
    ranges([&](int64_t begin, int64_t end) { range(a, begin, end, outside); });
    if (outside) __atomic_fetch_or(a.outside, outside, __ATOMIC_RELAXED);
  });
}

// The baseline has no instructions for bfloat16: there it is staged, like float16.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr bool bf16_in_place = true;
#else
constexpr bool bf16_in_place = false;
#endif

template <class F>
inline void rowwise_formula(const RowwiseArgs& a) {
  using Half = c10::BFloat16;
  const bool masked = a.mask.data;
  if (a.use_double)
    masked ? rowwise_stored<F, double, double, double, true>(a)
           : rowwise_stored<F, double, double, double, false>(a);
  else if (masked)
    rowwise_stored<F, float, float, float, true>(a);
  else if (!bf16_in_place || !params_are<F>(DType::bf16, a))
    rowwise_stored<F, float, float, float, false>(a);
  else if constexpr (bf16_in_place) {
    if (a.in[0].dtype == DType::bf16 && !a.in[0].per_row)
      rowwise_stored<F, float, Half, Half, false>(a);
    else
      rowwise_stored<F, float, float, Half, false>(a);
  }
}

inline void rowwise(const RowwiseArgs& a) {
  with_formula(a.family, [&](auto formula) { rowwise_formula<decltype(formula)>(a); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
