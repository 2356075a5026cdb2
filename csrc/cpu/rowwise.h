// The only loop over elements of a likelihood: load, formula, mask, reduce along the row, store.
//
// A row is taken in tiles that fit the L1 cache; of short rows a tile has many, whose sums are
// taken behind the formula. Inputs in the compute type, and parameters in bfloat16, are read where
// they lie; others (float16, uint8, a constant per row) are staged in a tile-sized buffer, so that
// few instantiations serve every dtype.
#pragma once

#include "parallel.h"
#include "sums.h"
#include "tiles.h"

#include "../formulas/all.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// How many elements ahead inputs are fetched: the hardware's prefetcher stops at each page's end.
constexpr int64_t ahead = 512;

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
template <class F, class T, class X, class S>
struct Pointers {
  const X* x;
  X* dx;
  const S* param[F::inputs];
  S* dparam[F::inputs];
  const T* mask;
  // Of short rows: each element's scale, and where its value goes.
  const T* factor;
  T* value;
};

// One tile: returns Σ value, or of short rows stores the values; writes scale · gradient where that
// is wanted; flags inputs outside their domain. A partial vector is loaded with zeros behind it,
// which lie in every domain; what it adds to the sum is cut off.
template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
inline double formula_tile(const Pointers<F, T, X, S>& t, int64_t n, const Vec<T>* options, T scale,
                           unsigned& outside) {
  using V = Vec<T>;
  constexpr int P = parts<T, S>;
  constexpr bool may_mask = Masked || Short;
  const V zero(T(0)), factor(scale);
  constexpr unsigned unit_inputs = units<F>();
  InUnit<V> inside[F::inputs];
  const Pointers<F, T, X, S> here = t;  // a copy: a store of floats could change what `t` refers to

  const double total =
      sum_vectors<T, S>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
        V in[F::inputs][P], grad[F::inputs][P];
        load(here.x + i, count, in[0]);
        for (int j = 1; j < F::inputs; ++j) load(here.param[j] + i, count, in[j]);
        __builtin_prefetch(here.x + i + ahead, 0, 2);
        for (int j = 1; j < F::inputs; ++j) __builtin_prefetch(here.param[j] + i + ahead, 0, 2);
        Mask<V> drop{};
        const bool masked = Masked || (Short && here.mask);
        if constexpr (may_mask)
          if (masked) drop = equal(V::loadu(here.mask + i, count), zero);
        for (int p = 0; p < P; ++p) {
          V v[F::inputs];
          for (int j = 0; j < F::inputs; ++j) {
            v[j] = in[j][p];
            // Zeroed before the formula for the domain's sake, after it for the value's.
            if constexpr (may_mask)
              if (masked) v[j] = select(drop, zero, v[j]);
            if (unit_inputs >> j & 1) inside[j].add(v[j]);
          }
          const auto r = F::template eval<V>(v, options);
          for (int j = 0; j < F::inputs; ++j) grad[j][p] = r.grad[j];
          V value = r.value, odds = r.odds;
          if constexpr (Short) {
            if constexpr (requires { F::log_odds; }) value = value - log1p(odds);
            if (masked) value = select(drop, zero, value);
            value.store(here.value + i, count);
            continue;
          }
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
            if constexpr (Short) {
              const V f = V::loadu(here.factor + i, count);
              v = select(equal(f, zero), zero, f * v);  // not 0 · ∞: β may be 0, the KL infinite
            } else {
              v = factor * v;
            }
            if constexpr (may_mask)
              if (masked) v = select(drop, zero, v);
          }
          j == 0 ? store(grad[j], here.dx + i, count) : store(grad[j], here.dparam[j] + i, count);
        }
      });

  for (int j = 0; j < F::inputs; ++j)
    if (unit_inputs >> j & 1 && !inside[j].all() &&
        !(j == 0 ? in_unit(t.x, n, t.mask) : in_unit(t.param[j], n, t.mask)))
      outside |= 1u << j;
  return total;
}

// The work in units that any thread may do: as many short rows as fit a tile, or a row's chunk.
struct Units {
  bool together;
  int64_t rows, per_row, count, elements;
  explicit Units(const RowwiseArgs& a)
      : together(a.cols > 0 && a.cols <= short_row),
        rows(together ? tile / a.cols : 1),
        per_row(chunks(a.cols)),
        count(together ? (a.rows + rows - 1) / rows : a.rows * per_row),
        elements(together ? rows * a.cols : std::min(a.cols, row_chunk)) {}
};

// X is how x and its gradient are read and written, S how the parameters and theirs: T, then staged
// where they are something else, or bfloat16.
template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
class RowTiles {
  using V = Vec<T>;

 public:
  unsigned outside = 0;

  explicit RowTiles(const RowwiseArgs& args) : a(args), units(args) {
    for (int k = 0; k < max_options; ++k) options[k] = num<V>(a.options[k]);
    T weight(1);
    if (same_weight && a.weight.data) weight = *load_tile(a.weight, {0, 1, 0, 1}, &weight);
    if (Short) std::fill_n(factor, tile, static_cast<T>(a.scale * weight));
  }

  void range(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) Short ? short_rows(unit) : chunk(unit);
  }

 private:
  void short_rows(int64_t unit) {
    const int64_t row = unit * units.rows;
    const Tile t{row, std::min(units.rows, a.rows - row), 0, a.cols};
    const auto p = open(t);
    formula_tile<F, T, X, S, Grad, Masked, Short>(p, t.size(), options, T(0), outside);
    close(t, p, [&](int j, const T* values) {
      sum_rows(values, t.rows, t.cols, static_cast<T*>(a.sum[j]) + row);
    });
  }

  void chunk(int64_t unit) {
    const int64_t row = unit / units.per_row, first = unit % units.per_row * row_chunk;
    const int64_t last = std::min(a.cols, first + row_chunk);
    double scale = a.scale;
    T weight{};
    if (Grad && a.weight.data) scale *= *load_tile(a.weight, {row, 1, 0, 1}, &weight);
    double sums[1 + max_inputs] = {};
    for (int64_t col = first; col < last; col += tile) {
      const Tile t{row, 1, col, std::min(tile, last - col)};
      const auto p = open(t);
      sums[0] += formula_tile<F, T, X, S, Grad, Masked, Short>(p, t.size(), options,
                                                               static_cast<T>(scale), outside);
      if (Grad && scale == 0) {  // not 0 · ∞: β may be 0 where the KL is infinite
        if (p.dx) std::fill_n(p.dx, t.size(), X(0));
        for (int j = 1; j < F::inputs; ++j)
          if (p.dparam[j]) std::fill_n(p.dparam[j], t.size(), S(0));
      }
      close(t, p, [&](int j, const T* values) { sums[j] += sum_of(values, t.size()); });
    }
    for (int j = 0; j < 1 + F::inputs; ++j) put(j, unit, sums[j]);
  }

  // The tile's inputs and where its outputs go.
  Pointers<F, T, X, S> open(const Tile& t) {
    Pointers<F, T, X, S> p{};
    if (a.mask.data) p.mask = load_tile(a.mask, t, mask);
    if (Short) {
      p.value = value;
      p.factor = factor;
      if (Grad && !same_weight) {
        const T* weight = load_tile(a.weight, t, factor);
        for (int64_t i = 0; i < t.size(); ++i) factor[i] = static_cast<T>(weight[i] * a.scale);
      }
    }
    p.x = load_tile(a.in[0], t, x);
    if (Grad) p.dx = gradient(0, t, dx);
    for (int j = 1; j < F::inputs; ++j) {
      p.param[j] = load_tile(a.in[j], t, param[j - 1]);
      if (Grad) p.dparam[j] = gradient(j, t, dparam[j - 1]);
    }
    return p;
  }

  template <class Z>
  Z* gradient(int j, const Tile& t, Z* buffer) {
    if (a.sum[1 + j]) return buffer;
    return a.grad[j].data ? output_tile(a.grad[j], t.row * a.cols + t.col, buffer) : nullptr;
  }

  // Writes out what is staged; calls sum(j, values) for what is summed along the row.
  template <class Sum>
  void close(const Tile& t, const Pointers<F, T, X, S>& p, Sum&& sum) {
    const int64_t start = t.row * a.cols + t.col, n = t.size();
    if constexpr (Short) sum(0, p.value);
    if (Grad && p.dx) store_tile(a.grad[0], start, n, p.dx);
    for (int j = 1; Grad && j < F::inputs; ++j) {
      if (!p.dparam[j]) continue;
      if constexpr (std::is_same_v<S, T>)
        if (a.sum[1 + j]) {
          sum(1 + j, p.dparam[j]);
          continue;
        }
      store_tile(a.grad[j], start, n, p.dparam[j]);
    }
  }

  void put(int j, int64_t at, double sum) {
    if (!a.sum[j]) return;
    if (units.per_row > 1)
      static_cast<double*>(a.sum[j])[at] = sum;
    else
      static_cast<T*>(a.sum[j])[at] = static_cast<T>(sum);
  }

  const RowwiseArgs& a;
  const Units units;
  const bool same_weight = !a.weight.data || a.weight.row_stride == 0;  // for every row
  V options[max_options];
  alignas(64) X x[tile], dx[tile];
  alignas(64) S param[F::inputs - 1][tile], dparam[F::inputs - 1][tile];
  alignas(64) T mask[tile], value[Short ? tile : 1], factor[Short ? tile : 1];
};

// Whether the parameters and their gradients are dense and of that dtype.
template <class F>
inline bool params_are(DType dtype, const RowwiseArgs& a) {
  for (int j = 1; j < F::inputs; ++j)
    if (a.in[j].dtype != dtype || a.in[j].col_stride == 0 || a.sum[1 + j]) return false;
  return true;
}

template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
inline void rowwise_tiles(const RowwiseArgs& a) {
  const Units units(a);
  parallel_units(units.count, units.elements, [&](auto&& ranges) {
    RowTiles<F, T, X, S, Grad, Masked, Short> tiles(a);
    ranges([&](int64_t begin, int64_t end) { tiles.range(begin, end); });
    if (tiles.outside) __atomic_fetch_or(a.outside, tiles.outside, __ATOMIC_RELAXED);
  });
}

template <class F, class T, class X, class S, bool Masked>
inline void rowwise_stored(const RowwiseArgs& a) {
  // The loop with gradients writes none where none is wanted. The one without, a second of
  // compiling for each formula, is made for the common case alone.
  if constexpr (std::is_same_v<T, float> && !Masked)
    if (!a.want_grad) return rowwise_tiles<F, T, X, S, false, Masked, false>(a);
  rowwise_tiles<F, T, X, S, true, Masked, false>(a);
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
  if (Units(a).together)
    a.use_double ? rowwise_tiles<F, double, double, double, true, false, true>(a)
                 : rowwise_tiles<F, float, float, float, true, false, true>(a);
  else if (a.use_double)
    masked ? rowwise_stored<F, double, double, double, true>(a)
           : rowwise_stored<F, double, double, double, false>(a);
  else if (masked)
    rowwise_stored<F, float, float, float, true>(a);
  else if (!bf16_in_place || !params_are<F>(DType::bf16, a))
    rowwise_stored<F, float, float, float, false>(a);
  else if constexpr (bf16_in_place) {
    if (a.in[0].dtype == DType::bf16 && a.in[0].col_stride != 0)
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
