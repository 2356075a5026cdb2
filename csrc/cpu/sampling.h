// The latent loop: draws ε, writes z, sums the KL; and its backward, which draws the same ε again.
#pragma once

#include "philox.h"
#include "rowwise.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

static_assert(tile <= Normals::max_request);

// ε of sample `sample` (of all K·batch, in stream order), columns [col, col + n), in the compute
// type.
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

// Calls body(batch row, first column, columns, unit) for every tile, over threads.
template <class Args, class Body>
inline void for_tiles(const Args& a, Body&& body) {
  const int64_t per_row = chunks(a.cols);
  const int64_t work = std::min(a.cols, row_chunk) * a.num_samples;
  at::parallel_for(0, a.batch * per_row, grain(work), [&](int64_t begin, int64_t end) {
    Normals normals(a.seed);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / per_row, first = unit % per_row * row_chunk;
      const int64_t last = std::min(a.cols, first + row_chunk);
      for (int64_t col = first; col < last; col += tile)
        body(normals, b, col, std::min(tile, last - col), unit);
    }
  });
}

template <class Args>
inline uint64_t stream_index(const Args& a, int64_t b, int64_t k, int64_t col) {
  const uint64_t sample = (static_cast<uint64_t>(b) + a.sample_offset) * a.num_samples + k;
  return sample * a.cols + col;
}

template <class T>
inline void sample_as(const SampleArgs& a) {
  using V = Vec<T>;
  if (a.kl) std::memset(a.kl, 0, sizeof(double) * a.batch * chunks(a.cols));
  for_tiles(a, [&](Normals& normals, int64_t b, int64_t col, int64_t n, int64_t unit) {
    alignas(64) T mu_buffer[tile], logvar_buffer[tile], eps_buffer[tile], z_buffer[tile];
    const T* mu = load_tile(a.mu, b, col, n, mu_buffer);
    const T* logvar = load_tile(a.logvar, b, col, n, logvar_buffer);
    for (int64_t k = 0; k < a.num_samples; ++k) {
      const int64_t start = (k * a.batch + b) * a.cols + col;
      const T* eps = load_noise(normals, stream_index(a, b, k, col), n, eps_buffer);
      T* z = output_tile(a.z, start, z_buffer);
      for (int64_t i = 0; i < n; i += V::size()) {
        const int64_t c = std::min<int64_t>(V::size(), n - i);
        sample(V::loadu(mu + i, c), V::loadu(logvar + i, c), V::loadu(eps + i, c)).store(z + i, c);
      }
      store_tile(a.z, start, n, z);
    }
    if (a.kl) {
      const T* in[] = {mu, logvar};
      unsigned outside = 0;
      a.kl[unit] += formula_tile<StandardKL, T, false, false>(in, nullptr, nullptr, n, nullptr,
                                                              T(1), outside);
    }
  });
}

template <class T>
inline void sample_backward_as(const SampleBackwardArgs& a) {
  using V = Vec<T>;
  for_tiles(a, [&](Normals& normals, int64_t b, int64_t col, int64_t n, int64_t) {
    alignas(64) T mu_buffer[tile], logvar_buffer[tile], eps_buffer[tile], dz_buffer[tile];
    alignas(64) T dmu_buffer[tile], dlogvar_buffer[tile];
    alignas(64) T sum_dz[tile], sum_eps_dz[tile];
    const T* logvar = load_tile(a.logvar, b, col, n, logvar_buffer);
    std::memset(sum_dz, 0, n * sizeof(T));
    std::memset(sum_eps_dz, 0, n * sizeof(T));
    for (int64_t k = 0; a.grad_z.data && k < a.num_samples; ++k) {
      const T* eps = load_noise(normals, stream_index(a, b, k, col), n, eps_buffer);
      const T* dz = load_tile(a.grad_z, k * a.batch + b, col, n, dz_buffer);
      for (int64_t i = 0; i < n; ++i) {
        sum_dz[i] += dz[i];
        sum_eps_dz[i] += eps[i] * dz[i];
      }
    }
    const int64_t start = b * a.cols + col;
    T* dmu = output_tile(a.grad_mu, start, dmu_buffer);
    T* dlogvar = output_tile(a.grad_logvar, start, dlogvar_buffer);
    const T* mu = load_tile(a.mu, b, col, n, mu_buffer);
    T grad_kl = 0;
    if (a.grad_kl.data) grad_kl = *load_tile(a.grad_kl, b, 0, 1, &grad_kl);
    for (int64_t i = 0; i < n; i += V::size()) {
      const int64_t c = std::min<int64_t>(V::size(), n - i);
      const V lv = V::loadu(logvar + i, c);
      V g_mu = V::loadu(sum_dz + i, c);
      V g_logvar = V(T(0));
      if (a.grad_z.data) g_logvar = sample_dlogvar(lv, V::loadu(sum_eps_dz + i, c));
      if (a.grad_kl.data) {
        const V in[] = {V::loadu(mu + i, c), lv};
        const auto kl = StandardKL::eval<V>(in, nullptr);
        g_mu = fmadd(V(grad_kl), kl.grad[0], g_mu);
        g_logvar = fmadd(V(grad_kl), kl.grad[1], g_logvar);
      }
      g_mu.store(dmu + i, c);
      g_logvar.store(dlogvar + i, c);
    }
    store_tile(a.grad_mu, start, n, dmu);
    store_tile(a.grad_logvar, start, n, dlogvar);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
