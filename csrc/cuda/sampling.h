// The latent kernels: draw ε, write z, sum the KL; and the backward, which draws the same ε again.
// In the order of the stream wherever that is the batch's, else row by row.
#pragma once

#include "../math/compounds.h"
#include "../math/philox.h"

#include "../formulas/all.h"
#include "memory.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

FASTVAE_INLINE void four_normals(const PhiloxKey& key, uint64_t counter, float (&eps)[4]) {
  const Philox w =
      philox4x32_10(I32(static_cast<int32_t>(counter)), static_cast<uint32_t>(counter >> 32), key);
  F32 n[4];
  box_muller(w.word[0], w.word[1], n[0], n[1]);
  box_muller(w.word[2], w.word[3], n[2], n[3]);
  for (int k = 0; k < 4; ++k) eps[k] = n[k].v;
}

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
      four_normals(key, row / 4 + i, eps);
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

FASTVAE_INLINE int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A counter's four elements among those of the batch, which follow one another in the stream where
// there is no sample_index: rows of any length share counters.
struct Four {
  uint64_t counter;
  int64_t at[4], row[4], col[4];  // `at`, from the first; a row for each draw of each sample
  bool exists[4];

  FASTVAE_INLINE Four(const cuda::StreamArgs& s, int64_t batch, int64_t cols, int64_t i) {
    const uint64_t first = stream_row(s, 0, 0, cols);
    const int64_t all = batch * s.num_samples * cols;
    counter = first / 64 * 16 + i;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      at[e] = i / 16 * 64 + i % 16 + 16 * e - static_cast<int64_t>(first % 64);
      exists[e] = at[e] >= 0 && at[e] < all;
      if (!exists[e]) at[e] = 0;
      row[e] = quotient(at[e], cols);
      col[e] = at[e] - row[e] * cols;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : 3)
    sample_stream_kernel(const __grid_constant__ cuda::SampleArgs a) {
  const PhiloxKey key = key_of(a.stream);
  const int64_t draws = a.stream.num_samples, step = gridDim.x * int64_t{block_threads};
  for (int64_t i = blockIdx.x * int64_t{block_threads} + threadIdx.x; i < a.counters; i += step) {
    const Four four(a.stream, a.batch, a.cols, i);
    int64_t b[4];
    Lane<T> mu[4], logvar[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      b[e] = draws == 1 ? four.row[e] : quotient(four.row[e], draws);
      mu[e] = element<T>(a.mu, b[e], four.col[e]);
      logvar[e] = element<T>(a.logvar, b[e], four.col[e]);
    }
    float eps[4];
    four_normals(key, four.counter, eps);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t k = four.row[e] - b[e] * draws;
      const auto z = fastvae::sample(mu[e], logvar[e], Lane<T>(T(eps[e])));
      if (four.exists[e])
        store_one<T>(a.z.data, a.z.dtype, (k * a.batch + b[e]) * a.cols + four.col[e], z.v);
    }
  }
  if (!a.kl) return;
  const Place place(a.split, a.batch, a.cols, 1);
  T kl = 0;
  for (int64_t col = place.first; col < place.end; col += a.split.lanes) {
    const Lane<T> latent[] = {element<T>(a.mu, place.row, col),
                              element<T>(a.logvar, place.row, col)};
    kl += StandardKL::eval<Lane<T>>(latent, nullptr).value.v;
  }
  kl = sum_group(kl, a.split.lanes);
  if (place.exists && place.lane == 0)
    static_cast<T*>(a.kl)[place.row * a.split.splits + place.split] = kl;
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

// The gradients of one element, where Σ dz and Σ ε dz over its draws are known.
template <class T>
FASTVAE_INLINE void store_gradients(const cuda::SampleBackwardArgs& a, int64_t at,
                                    const Lane<T> (&latent)[2], const Lane<T>& kl_factor,
                                    Lane<T> of_mu, Lane<T> of_logvar) {
  if (a.grad_z.data) of_logvar = sample_dlogvar(latent[1], of_logvar);
  if (kl_factor.v != T(0)) {  // not 0 · ∞: β may be 0 where the KL is infinite
    const auto d = StandardKL::eval<Lane<T>>(latent, nullptr);
    of_mu = fmadd(kl_factor, d.grad[0], of_mu);
    of_logvar = fmadd(kl_factor, d.grad[1], of_logvar);
  }
  store_one<T>(a.grad_mu.data, a.grad_mu.dtype, at, of_mu.v);
  store_one<T>(a.grad_logvar.data, a.grad_logvar.dtype, at, of_logvar.v);
}

template <class T>
FASTVAE_INLINE Lane<T> kl_factor_of(const cuda::SampleBackwardArgs& a, int64_t b) {
  return a.grad_kl.data ? element<T>(a.grad_kl, b, 0) : Lane<T>(T(0));
}

// One draw.
template <class T>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : 3)
    sample_stream_backward_kernel(const __grid_constant__ cuda::SampleBackwardArgs a) {
  const PhiloxKey key = key_of(a.stream);
  const int64_t step = gridDim.x * int64_t{block_threads};
  for (int64_t i = blockIdx.x * int64_t{block_threads} + threadIdx.x; i < a.counters; i += step) {
    const Four four(a.stream, a.batch, a.cols, i);
    Lane<T> latent[4][2], upstream[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      latent[e][0] = element<T>(a.mu, four.row[e], four.col[e]);
      latent[e][1] = element<T>(a.logvar, four.row[e], four.col[e]);
      upstream[e] = element<T>(a.grad_z, four.row[e], four.col[e]);
    }
    float eps[4];
    four_normals(key, four.counter, eps);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (four.exists[e])
        store_gradients<T>(a, four.at[e], latent[e], kl_factor_of<T>(a, four.row[e]), upstream[e],
                           Lane<T>(T(eps[e])) * upstream[e]);
  }
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
  const Lane<T> kl_factor = kl_factor_of<T>(a, b);
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
    for (int e = 0; e < M; ++e)
      store_gradients<T>(a, b * a.cols + col + e * Draw::step, latent[e], kl_factor, of_mu[e],
                         of_logvar[e]);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
