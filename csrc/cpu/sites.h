// The loop over sites: formulas one of whose inputs has planes. The lanes of a vector are
// neighbouring sites. Tiles of sites are staged plane by plane, whatever their order in memory:
// planes of a power of two of columns would otherwise share the few lines of one cache set.
#pragma once

#include "formula_tile.h"
#include "parallel.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// Calls body(site, count, offset, step) for stretches of the tile's sites that lie `step` apart,
// the first of them `offset` elements behind the operand's start.
template <class Body>
inline void for_stretches(const Tile& t, int64_t row_stride, int64_t col_stride, int64_t period,
                          Body&& body) {
  const int64_t first = t.row % period, column = t.col * col_stride;
  const bool wraps = first + t.rows > period;
  if (!wraps && t.cols == 1 && t.rows > 1)
    return body(0, t.rows, first * row_stride + column, row_stride);
  if (!wraps && (t.rows == 1 || row_stride == t.cols * col_stride))
    return body(0, t.size(), first * row_stride + column, col_stride);
  for (int64_t r = 0; r < t.rows; ++r)
    body(r * t.cols, t.cols, (first + r) % period * row_stride + column, col_stride);
}

constexpr int64_t block = 16;  // sites and planes that are transposed at once

// Calls whole(site, plane) for blocks, and each(site, plane) for what is left beside them.
template <class Whole, class Each>
inline void for_blocks(int64_t sites, int64_t planes, Whole&& whole, Each&& each) {
  for (int64_t i = 0; i < sites; i += block)
    for (int64_t k = 0; k < planes; k += block) {
      if (i + block <= sites && k + block <= planes) {
        whole(i, k);
        continue;
      }
      for (int64_t a = i; a < std::min(sites, i + block); ++a)
        for (int64_t b = k; b < std::min(planes, k + block); ++b) each(a, b);
    }
}

// to[k · ld + i] = from[i · step + k]: a site's planes lie end to end.
template <class T, class S>
inline void split_planes(const S* from, int64_t step, int64_t sites, int64_t planes, T* to,
                         int64_t ld) {
  for_blocks(
      sites, planes,
      [&](int64_t i, int64_t k) {
        const S* source = from + i * step + k;
        if constexpr (std::is_same_v<S, T>) {
          at::vec::transpose_mxn<T, block, block>(source, step, to + k * ld + i, ld);
        } else {
          T wide[block * block];
          for (int64_t a = 0; a < block; ++a) widen(source + a * step, block, wide + a * block);
          at::vec::transpose_mxn<T, block, block>(wide, block, to + k * ld + i, ld);
        }
      },
      [&](int64_t i, int64_t k) { to[k * ld + i] = static_cast<T>(from[i * step + k]); });
}

// to[i · step + k] = from[k · ld + i].
template <class T, class S>
inline void join_planes(const T* from, int64_t ld, int64_t sites, int64_t planes, S* to,
                        int64_t step) {
  for_blocks(
      sites, planes,
      [&](int64_t i, int64_t k) {
        S* target = to + i * step + k;
        if constexpr (std::is_same_v<S, T>) {
          at::vec::transpose_mxn<T, block, block>(from + k * ld + i, ld, target, step);
        } else {
          T wide[block * block];
          at::vec::transpose_mxn<T, block, block>(from + k * ld + i, ld, wide, block);
          for (int64_t a = 0; a < block; ++a)
            at::vec::convert<T, S>(wide + a * block, target + a * step, block);
        }
      },
      [&](int64_t i, int64_t k) { to[i * step + k] = static_cast<S>(from[k * ld + i]); });
}

// buffer[k · ld + i] = plane k of the tile's site i.
template <class T>
inline void load_sites(const Operand& x, const Tile& t, int64_t ld, T* buffer) {
  with_dtype(x.dtype, [&](auto s) {
    const auto* data = static_cast<const decltype(s)*>(x.data);
    for_stretches(t, x.row_stride, x.col_stride, x.period,
                  [&](int64_t site, int64_t n, int64_t offset, int64_t step) {
                    const auto* from = data + offset;
                    if (step != 1 && x.plane_stride == 1)
                      return split_planes(from, step, n, x.planes, buffer + site, ld);
                    for (int64_t k = 0; k < x.planes; ++k, from += x.plane_stride) {
                      T* to = buffer + k * ld + site;
                      if (step == 1)
                        widen(from, n, to);
                      else
                        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * step]);
                    }
                  });
  });
}

// The same way back, to rows [planes, cols] or [cols, planes].
template <class T>
inline void store_sites(const Output& y, int64_t planes, int64_t cols, const Tile& t, int64_t ld,
                        const T* buffer) {
  with_dtype(y.dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (!std::is_integral_v<S>)  // no gradient is
      for_stretches(t, planes * cols, y.planes_last ? planes : 1, t.row + t.rows,
                    [&](int64_t site, int64_t n, int64_t offset, int64_t step) {
                      S* to = static_cast<S*>(y.data) + offset;
                      if (step != 1) return join_planes(buffer + site, ld, n, planes, to, step);
                      for (int64_t k = 0; k < planes; ++k)
                        at::vec::convert<T, S>(buffer + k * ld + site, to + k * cols, n);
                    });
  });
}

// An input at some sites. `gradients` null: not wanted.
template <class T>
struct Planes {
  const T* values;
  T* gradients;
  int64_t count;
};

// What a formula sees where the lanes are sites: the vector of them that begins at `first`.
template <class F, class T, bool Grad>
struct Neighbours {
  using V = Vec<T>;
  const Planes<T> (&inputs)[inputs_of<F>];
  const V* options;
  int64_t first, ld;
  V factor;
  Mask<V> drop;  // where gradients are 0, whatever they are

  FASTVAE_INLINE int64_t planes(int j) const { return inputs[j].count; }
  FASTVAE_INLINE V in(int j, int64_t k) const {
    return V::loadu(inputs[j].values + k * ld + first);
  }
  FASTVAE_INLINE V option(int i) const { return options[i]; }
  FASTVAE_INLINE bool wants(int j) const { return Grad && inputs[j].gradients; }
  FASTVAE_INLINE void grad(int j, int64_t k, const V& g) const {
    if (wants(j)) select(drop, num<V>(0), factor * g).store(inputs[j].gradients + k * ld + first);
  }
  FASTVAE_INLINE void keep(int j, int64_t k, const V& v) const {
    if (wants(j)) v.store(inputs[j].gradients + k * ld + first);
  }
  template <class Again>
  FASTVAE_INLINE V kept(int j, int64_t k, Again&&) const {
    return V::loadu(inputs[j].gradients + k * ld + first);
  }
  FASTVAE_INLINE V index(int64_t k) const { return num<V>(static_cast<double>(k)); }
  FASTVAE_INLINE int64_t count(int j) const { return inputs[j].count; }
  FASTVAE_INLINE const V& real(int64_t, const V& v) const { return v; }
  FASTVAE_INLINE const V& sum(const V& v) const { return v; }
  FASTVAE_INLINE const V& largest(const V& v) const { return v; }
};

// And where they are one site's planes, the last of them repeated behind it. An input without
// planes is the same in all lanes.
template <class F, class T, bool Grad>
struct OneSite {
  using V = Vec<T>;
  static constexpr int64_t width = V::size();
  static constexpr unsigned single = inputs_that<F>([](Input i) { return i.planes == 1; });
  const Planes<T> (&inputs)[inputs_of<F>];
  const V* options;
  V factor;
  bool drop;
  V first = V::arange(T(0), T(1));  // the planes of the first vector

  FASTVAE_INLINE int64_t planes(int j) const { return (inputs[j].count + width - 1) / width; }
  FASTVAE_INLINE V in(int j, int64_t k) const {
    return single >> j & 1 ? V(*inputs[j].values) : V::loadu(inputs[j].values + k * width);
  }
  FASTVAE_INLINE V option(int i) const { return options[i]; }
  FASTVAE_INLINE bool wants(int j) const { return Grad && inputs[j].gradients; }
  FASTVAE_INLINE void grad(int j, int64_t k, const V& g) const {
    if (wants(j)) (drop ? num<V>(0) : factor * g).store(inputs[j].gradients + k * width);
  }
  FASTVAE_INLINE void keep(int j, int64_t k, const V& v) const {
    if (wants(j)) v.store(inputs[j].gradients + k * width);
  }
  template <class Again>
  FASTVAE_INLINE V kept(int j, int64_t k, Again&&) const {
    return V::loadu(inputs[j].gradients + k * width);
  }
  FASTVAE_INLINE V index(int64_t k) const { return first + V(static_cast<T>(k * width)); }
  FASTVAE_INLINE int64_t count(int j) const { return inputs[j].count; }
  FASTVAE_INLINE V real(int64_t k, const V& v) const {
    const V end = num<V>(static_cast<double>(inputs[1].count));
    return select(less(index(k), end), v, num<V>(0));
  }
  FASTVAE_INLINE V sum(const V& v) const { return V(sum_lanes(v)); }
  FASTVAE_INLINE V largest(const V& v) const { return V(max_lanes(v)); }
};

// Lanes are neighbouring sites, whose planes are staged, or, Across, the planes of one.
template <class F, class T, bool Grad, bool Across>
class SiteTiles {
  using V = Vec<T>;
  static constexpr int N = inputs_of<F>;

 public:
  unsigned outside = 0;

  explicit SiteTiles(const RowwiseArgs& args)
      : a(args), units(a.rows, a.cols, a.by_column, a.sites), ld(distance(a.sites)) {
    for (int k = 0; k < max_options; ++k) options[k] = num<V>(a.options[k]);
    int64_t planes = 0;
    for (int j = 0; j < N; ++j) planes += 2 * a.in[j].planes;
    buffer.reset(new T[planes * ld + 2 * N * V::size()]);
    T* next = buffer.get();
    for (int j = 0; j < N; ++j) {
      values[j] = next;
      gradients[j] = next + a.in[j].planes * ld + V::size();
      next = gradients[j] + a.in[j].planes * ld + V::size();
    }
  }

  void range(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t which = unit / units.per_row, part = unit % units.per_row;
      const int64_t row = which * units.rows, col = part * units.cols;
      const Tile t{row, std::min(units.rows, a.rows - row), col,
                   std::min(units.cols, a.cols - col)};
      const T* keep = a.mask.data ? load_tile(a.mask, t, mask) : nullptr;
      factors(t);
      if constexpr (Across)
        one_by_one(t, keep);
      else
        side_by_side(t, keep);
      if (units.together)
        sum_rows(value, t.rows, t.cols, static_cast<T*>(a.sum[0]) + row);
      else if (units.per_row > 1)
        static_cast<double*>(a.sum[0])[unit] = sum_of(value, t.cols);
      else
        static_cast<T*>(a.sum[0])[row] = static_cast<T>(sum_of(value, t.cols));
    }
  }

 private:
  // Of a plane from the one before; many of a power of two would share a cache set.
  static int64_t distance(int64_t sites) {
    return Across ? 1 : sites > site_step ? sites + site_step : sites;
  }

  void side_by_side(const Tile& t, const T* keep) {
    const int64_t n = t.size();
    Planes<T> inputs[N];
    for (int j = 0; j < N; ++j) {
      load_sites(a.in[j], t, ld, values[j]);
      inputs[j] = {values[j], a.grad[j].data ? gradients[j] : nullptr, a.in[j].planes};
    }
    check(inputs, n, keep);
    const V zero = num<V>(0);
    for (int64_t i = 0; i < n; i += V::size()) {
      const V f = V::loadu(factor + i);
      const V kept = keep ? V::loadu(keep + i, std::min<int64_t>(V::size(), n - i)) : num<V>(1);
      const auto masked = equal(kept, zero);
      // Not 0 · ∞: a sample's weight may be 0 where its gradient is infinite.
      const Mask<V> drop(masked | equal(f, zero));
      const Neighbours<F, T, Grad> sites{inputs, options, i, ld, f, drop};
      const V v = F::eval(sites);
      select(masked, zero, v).store(value + i);
    }
    for (int j = 0; Grad && j < N; ++j)
      if (inputs[j].gradients)
        store_sites(a.grad[j], inputs[j].count, a.cols, t, ld, inputs[j].gradients);
  }

  void one_by_one(const Tile& t, const T* keep) {
    for (int64_t i = 0; i < t.size(); ++i) {
      const int64_t row = t.row + i / t.cols, col = t.col + i % t.cols;
      const auto start = [&](int j) { return (row * a.cols + col) * a.in[j].planes; };
      Planes<T> inputs[N];
      for (int j = 0; j < N; ++j) {
        Operand in = a.in[j];  // whose columns are the planes
        const Tile planes{row, 1, col * in.col_stride, in.planes};
        in.col_stride = 1;
        inputs[j] = {load_tile(in, planes, values[j]), nullptr, in.planes};
        if (!whole(in.planes)) {
          if (inputs[j].values != values[j]) std::copy_n(inputs[j].values, in.planes, values[j]);
          std::fill_n(values[j] + in.planes, V::size(), values[j][in.planes - 1]);
          inputs[j].values = values[j];
        }
        if (!a.grad[j].data) continue;
        inputs[j].gradients = gradients[j];
        if (whole(in.planes)) inputs[j].gradients = output_tile(a.grad[j], start(j), gradients[j]);
      }
      const bool masked = keep && keep[i] == T(0);
      if (!masked) check(inputs, 1, nullptr);
      const OneSite<F, T, Grad> site{inputs, options, V(factor[i]), masked || factor[i] == T(0)};
      T lanes[V::size()];
      F::eval(site).store(lanes);
      value[i] = masked ? T(0) : lanes[0];
      for (int j = 0; Grad && j < N; ++j)
        if (inputs[j].gradients) store_planes(a.grad[j], start(j), inputs[j].count, gradients[j]);
    }
  }

  // Whether they fill vectors: else they are staged in some that have room behind them.
  static bool whole(int64_t planes) { return planes % V::size() == 0; }

  static void store_planes(const Output& y, int64_t start, int64_t n, const T* staged) {
    if (y.dtype == dtype_v<T> && !whole(n))
      std::copy_n(staged, n, static_cast<T*>(y.data) + start);
    else
      store_tile(y, start, n, staged);
  }

  void check(const Planes<T> (&inputs)[N], int64_t n, const T* keep) {
    for_domains<F>([&](int j, auto domain) {
      constexpr Domain d = decltype(domain)::value;
      const int64_t count = inputs[j].count, each = Across ? count : n;
      for (int64_t k = 0; d != Domain::real && k < (Across ? 1 : count); ++k)
        if (!all_in_domain<d>(inputs[j].values + k * ld, each, keep, inputs[1].count))
          outside |= 1u << j;
    });
  }

  // What multiplies each site's gradients.
  void factors(const Tile& t) {
    std::fill_n(factor, t.size(), static_cast<T>(a.scale));
    if (!a.weight.data) return;
    T buffer[tile];
    const T* weight = load_tile(a.weight, t, buffer);
    for (int64_t i = 0; i < t.size(); ++i) factor[i] = static_cast<T>(a.scale * weight[i]);
  }

  const RowwiseArgs& a;
  const Units units;
  const int64_t ld;
  V options[max_options];
  std::unique_ptr<T[]> buffer;
  T *values[N], *gradients[N];  // where they are staged
  alignas(64) T mask[tile], value[tile], factor[tile];
};

template <class F, class T, bool Grad, bool Across>
inline void site_tiles(const RowwiseArgs& a) {
  const Units units(a.rows, a.cols, a.by_column, a.sites);
  int64_t planes = 0;
  for (int j = 0; j < inputs_of<F>; ++j) planes += a.in[j].planes;
  const int64_t elements = units.rows * std::min(a.cols, units.cols) * planes;
  parallel_units(units.count, elements, [&](auto&& ranges) {
    SiteTiles<F, T, Grad, Across> tiles(a);
    ranges([&](int64_t begin, int64_t end) { tiles.range(begin, end); });
    if (tiles.outside) __atomic_fetch_or(a.outside, tiles.outside, __ATOMIC_RELAXED);
  });
}

template <class F, class T>
inline void sites_as(const RowwiseArgs& a) {
  if constexpr (across_planes<F>)
    if (a.across_planes)
      return a.want_grad ? site_tiles<F, T, true, true>(a) : site_tiles<F, T, false, true>(a);
  a.want_grad ? site_tiles<F, T, true, false>(a) : site_tiles<F, T, false, false>(a);
}

template <class F>
inline void sites_formula(const RowwiseArgs& a) {
  a.use_double ? sites_as<F, double>(a) : sites_as<F, float>(a);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
