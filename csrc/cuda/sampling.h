// The latent kernels: draw ε, write z, sum the KL; and the backward, which draws the same ε again.
#pragma once

#include "../math/compounds.h"
#include "../math/philox.h"

#include "../formulas/all.h"
#include "memory.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// The normals that a thread draws at a time. Whole: rows are multiples of 64 elements, so that one
// counter's four normals are 16 columns apart in one row. Else each element draws a counter of its
// own and uses one normal.
template <bool Whole>
struct Drawn {
  static constexpr int count = Whole ? 4 : 1;

  // The first of the columns, of the i-th such group in a row; and how far apart they are.
  static FASTVAE_INLINE int64_t column(int64_t i) { return Whole ? i / 16 * 64 + i % 16 : i; }
  static constexpr int step = 16;

  // ε at the columns of group i, in a row that begins at element `row` of the stream.
  static FASTVAE_INLINE void draw(const PhiloxKey& key, uint64_t row, int64_t i,
                                  float (&eps)[count]) {
    if constexpr (Whole) {
      const uint64_t counter = row / 4 + i;
      const Philox w = philox4x32_10(I32(static_cast<int32_t>(counter)),
                                     static_cast<uint32_t>(counter >> 32), key);
      F32 n[4];
      box_muller(w.word[0], w.word[1], n[0], n[1]);
      box_muller(w.word[2], w.word[3], n[2], n[3]);
      for (int k = 0; k < 4; ++k) eps[k] = n[k].v;
    } else {
      const uint64_t e = row + i, counter = e >> 6 << 4 | (e & 15);
      const Philox w = philox4x32_10(I32(static_cast<int32_t>(counter)),
                                     static_cast<uint32_t>(counter >> 32), key);
      const unsigned which = e >> 4 & 3;
      F32 n[2];
      box_muller(select(which < 2, w.word[0], w.word[2]), select(which < 2, w.word[1], w.word[3]),
                 n[0], n[1]);
      eps[0] = which % 2 ? n[1].v : n[0].v;
    }
  }
};

// Where row b's k-th draw begins in the stream.
FASTVAE_INLINE uint64_t stream_row(const cuda::StreamArgs& s, int64_t b, int64_t k, int64_t cols) {
  const int64_t sample = s.sample_index ? s.sample_index[b] : s.sample_offset + b;
  return static_cast<uint64_t>(sample * s.num_samples + k) * cols;
}

FASTVAE_INLINE PhiloxKey key_of(const cuda::StreamArgs& s) {
  const auto seed = static_cast<uint64_t>(*s.seed);
  return PhiloxKey(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

template <class T>
FASTVAE_INLINE Lane<T> element(const Source& in, int64_t row, int64_t col) {
  return Lane<T>(load_float<T>(in.data, in.dtype,
                               row_of(row, in.period) * in.row_stride + col * in.col_stride));
}

template <class T, bool Whole>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : 3)
    sample_kernel(const __grid_constant__ cuda::SampleArgs a) {
  using Draw = Drawn<Whole>;
  const int64_t groups = a.cols / Draw::count;
  const Place place(a.split, a.batch * a.stream.num_samples, groups, 1);
  const PhiloxKey key = key_of(a.stream);
  const int64_t k = place.row / a.batch, b = place.row - k * a.batch;
  const bool want_kl = a.kl && k == 0 && place.exists;
  T kl = 0;
  if (place.first < place.end) {
    const uint64_t row = stream_row(a.stream, b, k, a.cols);
    for (int64_t i = place.first; i < place.end; i += a.split.lanes) {
      const int64_t col = Draw::column(i);
      Lane<T> latent[Draw::count][2];
#pragma unroll
      for (int e = 0; e < Draw::count; ++e) {
        latent[e][0] = element<T>(a.mu, b, col + e * Draw::step);
        latent[e][1] = element<T>(a.logvar, b, col + e * Draw::step);
      }
      float eps[Draw::count];
      Draw::draw(key, row, i, eps);
#pragma unroll
      for (int e = 0; e < Draw::count; ++e) {
        const auto z = fastvae::sample(latent[e][0], latent[e][1], Lane<T>(T(eps[e])));
        store_one<T>(a.z.data, a.z.dtype, place.row * a.cols + col + e * Draw::step, z.v);
        if (want_kl) kl += StandardKL::eval<Lane<T>>(latent[e], nullptr).value.v;
      }
    }
  }
  if (!a.kl) return;
  kl = sum_group(kl, a.split.lanes);
  if (want_kl && place.lane == 0) static_cast<T*>(a.kl)[b * a.split.splits + place.split] = kl;
}

template <class T, bool Whole>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : 3)
    sample_backward_kernel(const __grid_constant__ cuda::SampleBackwardArgs a) {
  using Draw = Drawn<Whole>;
  constexpr int M = Draw::count;
  const int64_t groups = a.cols / M;
  const Place place(a.split, a.batch, groups, 1);
  if (place.first >= place.end) return;
  const int64_t b = place.row;
  const PhiloxKey key = key_of(a.stream);
  const Lane<T> kl_factor(a.grad_kl.data ? element<T>(a.grad_kl, b, 0).v : T(0));
  for (int64_t i = place.first; i < place.end; i += a.split.lanes) {
    const int64_t col = Draw::column(i);
    Lane<T> latent[M][2], of_mu[M], of_logvar[M];
#pragma unroll
    for (int e = 0; e < M; ++e) {
      latent[e][0] = element<T>(a.mu, b, col + e * Draw::step);
      latent[e][1] = element<T>(a.logvar, b, col + e * Draw::step);
      of_mu[e] = of_logvar[e] = Lane<T>(T(0));
    }
    for (int64_t k = 0; a.grad_z.data && k < a.stream.num_samples; ++k) {
      Lane<T> upstream[M];
#pragma unroll
      for (int e = 0; e < M; ++e)
        upstream[e] = element<T>(a.grad_z, k * a.batch + b, col + e * Draw::step);
      float eps[M];
      Draw::draw(key, stream_row(a.stream, b, k, a.cols), i, eps);
#pragma unroll
      for (int e = 0; e < M; ++e) {
        of_mu[e] = of_mu[e] + upstream[e];
        of_logvar[e] = of_logvar[e] + Lane<T>(T(eps[e])) * upstream[e];
      }
    }
#pragma unroll
    for (int e = 0; e < M; ++e) {
      if (a.grad_z.data) of_logvar[e] = sample_dlogvar(latent[e][1], of_logvar[e]);
      if (kl_factor.v != T(0)) {  // not 0 · ∞: β may be 0 where the KL is infinite
        const auto d = StandardKL::eval<Lane<T>>(latent[e], nullptr);
        of_mu[e] = fmadd(kl_factor, d.grad[0], of_mu[e]);
        of_logvar[e] = fmadd(kl_factor, d.grad[1], of_logvar[e]);
      }
      const int64_t at = b * a.cols + col + e * Draw::step;
      store_one<T>(a.grad_mu.data, a.grad_mu.dtype, at, of_mu[e].v);
      store_one<T>(a.grad_logvar.data, a.grad_logvar.dtype, at, of_logvar[e].v);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
