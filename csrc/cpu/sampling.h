// The latent loop: draws ε, writes z, sums the KL; and its backward, which draws the same ε again.
#pragma once

#include "normals.h"
#include "rowwise.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

static_assert(tile <= Normals::max_request);

// ε of elements [index, index + n) of the stream, in the compute type.
template <class T>
inline const T* load_noise(Normals& normals, uint64_t index, int64_t n, T* buffer) {
  const float* eps = normals.at(index, n);
  if constexpr (std::is_same_v<T, float>) {
    return eps;
  } else {
    at::vec::convert<float, T>(eps, buffer, n);
    return buffer;
  }
}

// Calls body(normals, tile) for all of [batch, cols], over threads.
template <class Args, class Body>
inline void for_tiles(const Args& a, Body&& body) {
  const int64_t per_row = chunks(a.cols);
  const Stream& s = a.stream;
  const bool whole = !s.sample_index && s.num_samples == 1 && a.cols > 0 && a.cols <= tile / 2;
  const int64_t rows = whole ? tile / a.cols : 1;  // per unit
  const int64_t units = whole ? (a.batch + rows - 1) / rows : a.batch * per_row;
  const int64_t work = std::min(rows * a.cols, row_chunk) * s.num_samples;
  parallel_units(units, work, [&](auto&& ranges) {
    Normals normals(s.seed, /*in_order=*/!s.sample_index);
    ranges([&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        if (whole) {
          body(normals, Tile{unit * rows, std::min(rows, a.batch - unit * rows), 0, a.cols});
          continue;
        }
        const int64_t b = unit / per_row, first = unit % per_row * row_chunk;
        const int64_t last = std::min(a.cols, first + row_chunk);
        for (int64_t col = first; col < last; col += tile)
          body(normals, Tile{b, 1, col, std::min(tile, last - col)});
      }
    });
  });
}

template <class Args>
inline uint64_t stream_index(const Args& a, int64_t b, int64_t k, int64_t col) {
  const Stream& s = a.stream;
  const uint64_t sample = s.sample_index ? s.sample_index[b] : b + s.sample_offset;
  return (sample * s.num_samples + k) * a.cols + col;
}

template <class T>
inline void sample_as(const SampleArgs& a) {
  using V = Vec<T>;
  const int64_t per_row = chunks(a.cols);
  if (a.kl) std::memset(a.kl, 0, sizeof(double) * a.batch * per_row);
  for_tiles(a, [&](Normals& normals, const Tile& t) {
    alignas(64) T mu_buffer[tile], logvar_buffer[tile], buffer[tile], z_buffer[tile];
    const int64_t n = t.size();
    const T* mu = load_tile(a.mu, t, mu_buffer);
    const T* logvar = load_tile(a.logvar, t, logvar_buffer);
    for (int64_t k = 0; k < a.stream.num_samples; ++k) {
      const int64_t start = (k * a.batch + t.row) * a.cols + t.col;
      const T* eps = load_noise(normals, stream_index(a, t.row, k, t.col), n, buffer);
      T* z = output_tile(a.z, start, z_buffer);
      for_vectors<T>(n, [&](int64_t i, auto c) __attribute__((always_inline)) {
        sample(V::loadu(mu + i, c), V::loadu(logvar + i, c), V::loadu(eps + i, c)).store(z + i, c);
      });
      store_tile(a.z, start, n, z);
    }
    if (!a.kl) return;
    for_vectors<T>(n, [&](int64_t i, auto c) __attribute__((always_inline)) {
      const V in[] = {V::loadu(mu + i, c), V::loadu(logvar + i, c)};
      StandardKL::eval<V>(in, nullptr).value.store(buffer + i, c);
    });
    if (t.rows > 1)
      sum_rows(buffer, t.rows, t.cols, a.kl + t.row);
    else
      a.kl[t.row * per_row + t.col / row_chunk] += sum_of(buffer, t.cols);
  });
}

template <class T>
inline void sample_backward_as(const SampleBackwardArgs& a) {
  using V = Vec<T>;
  for_tiles(a, [&](Normals& normals, const Tile& t) {
    alignas(64) T mu_buffer[tile], logvar_buffer[tile], eps_buffer[tile], dz_buffer[tile];
    alignas(64) T dmu_buffer[tile], dlogvar_buffer[tile];
    alignas(64) T sum_dz[tile], sum_eps_dz[tile], grad_kl_buffer[tile];
    const int64_t n = t.size(), start = t.row * a.cols + t.col;
    const T* mu = load_tile(a.mu, t, mu_buffer);
    const T* logvar = load_tile(a.logvar, t, logvar_buffer);
    std::memset(sum_dz, 0, n * sizeof(T));
    std::memset(sum_eps_dz, 0, n * sizeof(T));
    for (int64_t k = 0; a.grad_z.data && k < a.stream.num_samples; ++k) {
      const T* eps = load_noise(normals, stream_index(a, t.row, k, t.col), n, eps_buffer);
      const T* dz = load_tile(a.grad_z, {k * a.batch + t.row, t.rows, t.col, t.cols}, dz_buffer);
      for (int64_t i = 0; i < n; ++i) {
        sum_dz[i] += dz[i];
        sum_eps_dz[i] += eps[i] * dz[i];
      }
    }
    const T* grad_kl = a.grad_kl.data ? load_tile(a.grad_kl, t, grad_kl_buffer) : nullptr;
    T* dmu = output_tile(a.grad_mu, start, dmu_buffer);
    T* dlogvar = output_tile(a.grad_logvar, start, dlogvar_buffer);
    for_vectors<T>(n, [&](int64_t i, auto c) __attribute__((always_inline)) {
      const V lv = V::loadu(logvar + i, c);
      V g_mu = V::loadu(sum_dz + i, c), g_logvar = V(T(0));
      if (a.grad_z.data) g_logvar = sample_dlogvar(lv, V::loadu(sum_eps_dz + i, c));
      if (a.grad_kl.data) {
        const V in[] = {V::loadu(mu + i, c), lv}, g = V::loadu(grad_kl + i, c);
        const auto kl = StandardKL::eval<V>(in, nullptr);
        const auto none = equal(g, V(T(0)));  // not 0 · ∞: β may be 0 where the KL is infinite
        g_mu = select(none, g_mu, fmadd(g, kl.grad[0], g_mu));
        g_logvar = select(none, g_logvar, fmadd(g, kl.grad[1], g_logvar));
      }
      g_mu.store(dmu + i, c);
      g_logvar.store(dlogvar + i, c);
    });
    store_tile(a.grad_mu, start, n, dmu);
    store_tile(a.grad_logvar, start, n, dlogvar);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
