// The only loop over elements of a likelihood: load, formula, mask, reduce along the row, store.
//
// A row is taken in tiles that fit the L1 cache; of short rows a tile has many, whose sums are
// taken behind the formula. Inputs in the compute type, and parameters in bfloat16, are read where
// they lie; others (float16, uint8, a constant per row) are staged in a tile-sized buffer, so that
// few instantiations serve every dtype.
#pragma once

#include "parallel.h"
#include "rare.h"
#include "sites.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// How many elements ahead inputs are fetched: the hardware's prefetcher stops at each page's end.
constexpr int64_t ahead = 512;

// X is how x and its gradient are read and written, S how the parameters and theirs: T, then staged
// where they are something else, or bfloat16.
template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
class RowTiles {
  using V = Vec<T>;
  static constexpr int N = inputs_of<F>;

 public:
  unsigned outside = 0;

  explicit RowTiles(const RowwiseArgs& args) : a(args), units(a.rows, a.cols, a.by_column) {
    for (int k = 0; k < max_options; ++k) options[k] = num<V>(a.options[k]);
    T weight(1);
    if (same_weight && a.weight.data) weight = *load_tile(a.weight, {0, 1, 0, 1}, &weight);
    if (Short) std::fill_n(factor, tile, static_cast<T>(a.scale * weight));
  }

  void range(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) Short ? short_rows(unit) : block(unit);
  }

 private:
  void short_rows(int64_t unit) {
    const int64_t row = unit * units.rows;
    const Tile t{row, std::min(units.rows, a.rows - row), 0, a.cols};
    const auto p = open(t);
    compute(p, t, T(0));
    close(t, p, [&](int j, const T* values) {
      if (j == 0 || !a.columns[j - 1])
        return sum_rows(values, t.rows, t.cols, static_cast<T*>(a.sum[j]) + row);
      double* sums = a.columns[j - 1] + unit * a.cols;
      std::fill_n(sums, a.cols, 0.0);
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t c = 0; c < a.cols; ++c) sums[c] += static_cast<double>(*values++);
    });
  }

  // A chunk of one row, or the same columns of several.
  void block(int64_t unit) {
    const int64_t which = unit / units.per_row, part = unit % units.per_row;
    const int64_t first = part * units.cols, last = std::min(a.cols, first + units.cols);
    for (int j = 0; a.by_column && j < N; ++j)
      if (a.columns[j]) std::fill_n(a.columns[j] + which * a.cols + first, last - first, 0.0);
    const int64_t end = std::min(a.rows, (which + 1) * units.rows);
    for (int64_t row = which * units.rows; row < end; ++row) {
      double sums[1 + N] = {};
      double scale = a.scale;
      T weight{};
      if (Grad && a.weight.data) scale *= *load_tile(a.weight, {row, 1, 0, 1}, &weight);
      for (int64_t col = first; col < last; col += tile) {
        const Tile t{row, 1, col, std::min(tile, last - col)};
        const auto p = open(t);
        sums[0] += compute(p, t, static_cast<T>(scale));
        if (Grad && scale == 0) {  // not 0 · ∞: β may be 0 where the KL is infinite
          if (p.dx) std::fill_n(p.dx, t.size(), X(0));
          for (int j = 1; j < N; ++j)
            if (p.dparam[j]) std::fill_n(p.dparam[j], t.size(), S(0));
        }
        close(t, p, [&](int j, const T* values) {
          if (j == 0 || !a.columns[j - 1]) {
            sums[j] += sum_of(values, t.size());
          } else {
            double* column = a.columns[j - 1] + which * a.cols + col;
            for (int64_t i = 0; i < t.cols; ++i) column[i] += static_cast<double>(values[i]);
          }
        });
      }
      for (int j = 0; j < 1 + N; ++j) put(j, row * units.per_row + part, sums[j]);
    }
  }

  double compute(const Pointers<F, T, X, S>& p, const Tile& t, T scale) {
    // Of a block the next tile lies in the next row.
    const int64_t next = a.by_column && !Short ? a.cols : ahead;
    double sum =
        formula_tile<F, T, X, S, Grad, Masked, Short>(p, t.size(), options, scale, next, outside);
    if constexpr (rare_inputs<F> > 0) sum += rare.add(p, t.size(), options, Short ? T(1) : scale);
    return sum;
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
    for (int j = 1; j < N; ++j) {
      p.param[j] = load_tile(a.in[j], t, param[j - 1]);
      if (Grad) p.dparam[j] = gradient(j, t, dparam[j - 1]);
    }
    return p;
  }

  template <class Z>
  Z* gradient(int j, const Tile& t, Z* buffer) {
    if (a.sum[1 + j] || a.columns[j]) return buffer;
    return a.grad[j].data ? output_tile(a.grad[j], t.row * a.cols + t.col, buffer) : nullptr;
  }

  // Writes out what is staged; calls sum(1 + j, values) for what is summed, and of short rows
  // sum(0, values) for the value.
  template <class Sum>
  void close(const Tile& t, const Pointers<F, T, X, S>& p, Sum&& sum) {
    const int64_t start = t.row * a.cols + t.col, n = t.size();
    if constexpr (Short) sum(0, p.value);
    if (Grad && p.dx) store_tile(a.grad[0], start, n, p.dx);
    for (int j = 1; Grad && j < N; ++j) {
      if (!p.dparam[j]) continue;
      if constexpr (std::is_same_v<S, T>)
        if (a.sum[1 + j] || a.columns[j]) {
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

  struct None {};
  const RowwiseArgs& a;
  const Units units;
  const bool same_weight = !a.weight.data || a.weight.row_stride == 0;  // for every row
  V options[max_options];
  std::conditional_t<(rare_inputs<F> > 0), RareLanes<F, T, Grad, Short>, None> rare;
  alignas(64) X x[tile], dx[tile];
  alignas(64) S param[N - 1][tile], dparam[N - 1][tile];
  alignas(64) T mask[tile], value[Short ? tile : 1], factor[Short ? tile : 1];
};

// Whether the parameters and their gradients are dense and of that dtype.
template <class F>
inline bool params_are(DType dtype, const RowwiseArgs& a) {
  for (int j = 1; j < inputs_of<F>; ++j)
    if (a.in[j].dtype != dtype || a.in[j].col_stride == 0 || a.sum[1 + j]) return false;
  return !a.by_column;
}

template <class F, class T, class X, class S, bool Grad, bool Masked, bool Short>
inline void rowwise_tiles(const RowwiseArgs& a) {
  const Units units(a.rows, a.cols, a.by_column);
  const int64_t elements = units.rows * std::min(a.cols, units.cols);
  parallel_units(units.count, elements, [&](auto&& ranges) {
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

// The baseline has no instructions for bfloat16: there it is staged, like float16; so it is where
// arithmetic hides it.
template <class F>
#if defined(FASTVAE_GENERIC)
constexpr bool bf16_in_place = false;
#else
constexpr bool bf16_in_place = rare_inputs<F> == 0;
#endif

template <class F>
inline void rowwise_formula(const RowwiseArgs& a) {
  using Half = c10::BFloat16;
  const bool masked = a.mask.data;
  if (Units(a.rows, a.cols, a.by_column).together)
    a.use_double ? rowwise_tiles<F, double, double, double, true, false, true>(a)
                 : rowwise_tiles<F, float, float, float, true, false, true>(a);
  else if (a.use_double)
    masked ? rowwise_stored<F, double, double, double, true>(a)
           : rowwise_stored<F, double, double, double, false>(a);
  else if (masked)
    rowwise_stored<F, float, float, float, true>(a);
  else if (!bf16_in_place<F> || !params_are<F>(DType::bf16, a))
    rowwise_stored<F, float, float, float, false>(a);
  else if constexpr (bf16_in_place<F>) {
    if (a.in[0].dtype == DType::bf16 && a.in[0].col_stride != 0)
      rowwise_stored<F, float, Half, Half, false>(a);
    else
      rowwise_stored<F, float, float, Half, false>(a);
  }
}

inline void rowwise(const RowwiseArgs& a) {
  with_formula(a.formula, [&](auto formula) {
    using F = decltype(formula);
    if constexpr (has_planes<F>)
      sites_formula<F>(a);
    else
      rowwise_formula<F>(a);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
