// The row kernel: any formula, its value summed along rows, with its gradients, in one pass.
#pragma once

#include "../math/compounds.h"

#include "../formulas/all.h"
#include "memory.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// The elements that a formula leaves to its eval_rare: a warp's lie in shared memory, packed, so
// that its threads do them together, and go back to whose they are.
template <class F, class T>
class RareElements {
  static constexpr int N = rare_inputs<F>, W = width<T>;

 public:
  struct Shared {
    T in[N][32 * W];  // x and the parameters; then the value and their gradients
  };

  // Of this thread's elements, those that `mine` has bits of. All threads of the warp take part.
  template <bool Grad, int M>
  static FASTVAE_INLINE void add(Shared& shared, unsigned mine, const T (&in)[M][W],
                                 const Lane<T>* options, T (&value)[W], T (&grad)[M][W]) {
    const unsigned lane = threadIdx.x % 32, before = (1u << lane) - 1;
    int at[W], count = 0;
#pragma unroll
    for (int p = 0; p < W; ++p) {
      const unsigned with = __ballot_sync(0xffffffffu, mine >> p & 1);
      at[p] = count + __popc(with & before);
      count += __popc(with);
    }
    if (count == 0) return;
#pragma unroll
    for (int p = 0; p < W; ++p)
      if (mine >> p & 1)
#pragma unroll
        for (int j = 0; j < N; ++j) shared.in[j][at[p]] = in[j][p];
    __syncwarp();
    for (int i = static_cast<int>(lane); i < count; i += 32) {
      Lane<T> v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = Lane<T>(shared.in[j][i]);
      const auto r = v[0].v <= T(F::rare_limit) ? F::template eval_rare<Lane<T>, 0>(v, options)
                                                : F::template eval_rare<Lane<T>, 1>(v, options);
      shared.in[0][i] = r.value.v;
      if constexpr (Grad) {
#pragma unroll
        for (int j = 1; j < N; ++j) shared.in[j][i] = r.grad[j].v;
      }
    }
    __syncwarp();
#pragma unroll
    for (int p = 0; p < W; ++p) {
      if (!(mine >> p & 1)) continue;
      value[p] += shared.in[0][at[p]];
      if constexpr (Grad) {
#pragma unroll
        for (int j = 1; j < N; ++j) grad[j][p] = shared.in[j][at[p]];
      }
    }
    __syncwarp();
  }
};

// Shared memory for the warps of a block, where the formula packs.
template <class F, class T>
using Packed = std::conditional_t<rare_inputs<F> != 0, typename RareElements<F, T>::Shared, char>;
template <class F>
constexpr int packing_warps = rare_inputs<F> != 0 ? block_threads / 32 : 1;

template <class F, class T>
FASTVAE_INLINE void load_options(const cuda::RowwiseArgs& a, Lane<T> (&options)[max_options]) {
  for (int i = 0; i < F::options; ++i) options[i] = Lane<T>(static_cast<T>(a.options[i]));
}

// What multiplies the row's gradients.
template <class T>
FASTVAE_INLINE T row_factor(const cuda::RowwiseArgs& a, int64_t row) {
  const T scale = static_cast<T>(a.scale);
  if (!a.weight.data) return scale;
  return scale * load_float<T>(a.weight.data, a.weight.dtype,
                               row_of(row, a.weight.period) * a.weight.row_stride);
}

// How many of the thread's neighbours from `col` on lie before `end`.
template <class T>
FASTVAE_INLINE int neighbours(int64_t col, int64_t end) {
  return col >= end ? 0 : end - col < width<T> ? static_cast<int>(end - col) : width<T>;
}

// The sum of n neighbours' values, and their gradients; `counts`: a bit each that isn't masked. All
// threads of a warp take part where the formula packs.
template <class F, class T, bool Grad>
FASTVAE_INLINE T elements(const cuda::RowwiseArgs& a, int64_t row, int64_t col, int n,
                          const Lane<T>* options, Packed<F, T>* packed, unsigned& counts,
                          T (&grad)[inputs_of<F>][width<T>]) {
  constexpr int N = inputs_of<F>, W = width<T>;
  constexpr bool odds_too = requires { F::log_odds; }, gain_too = requires { F::log_gain; };
  T in[N][W] = {}, value[W];
  counts = (1u << n) - 1;
  if (n > 0) {
    Fetched<T> fetched[N], mask;
#pragma unroll
    for (int j = 0; j < N; ++j)
      fetched[j].fetch(a.in[j], j == 0 ? a.in[j].dtype : floating(a.in[j].dtype), row, col, n);
    if (a.mask.data) {
      T keep[W];
      mask.fetch(a.mask, DType::u8, row, col, n);
      mask.understand(keep);
#pragma unroll
      for (int p = 0; p < W; ++p)
        if (keep[p] == T(0)) counts &= ~(1u << p);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) fetched[j].understand(in[j]);
  }
  Lane<T> odds(T(0)), gain(T(0));  // the products of what 1 is added to, beyond 1
  unsigned rare = 0;
#pragma unroll
  for (int p = 0; p < W; ++p) {
    Lane<T> v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = Lane<T>(in[j][p]);
    const auto r = F::template eval<Lane<T>>(v, options);
    value[p] = r.value.v;
#pragma unroll
    for (int j = 0; j < N; ++j) grad[j][p] = r.grad[j].v;
    const bool some = counts >> p & 1;
    if constexpr (odds_too) odds = select(some, fmadd(odds, Lane<T>(T(1)) + r.odds, r.odds), odds);
    if constexpr (gain_too) gain = select(some, fmadd(gain, Lane<T>(T(1)) + r.gain, r.gain), gain);
    if (rare_inputs<F> != 0 && some && in[0][p] > T(0)) rare |= 1u << p;
  }
  if constexpr (rare_inputs<F> != 0)
    RareElements<F, T>::template add<Grad>(packed[threadIdx.x / 32], rare, in, options, value,
                                           grad);
  T sum = 0;
#pragma unroll
  for (int p = 0; p < W; ++p) sum += counts >> p & 1 ? value[p] : T(0);
  if constexpr (odds_too) sum -= log1p(odds).v;
  if constexpr (gain_too) sum += log1p(gain).v;
  return sum;
}

// Stores the gradients of n neighbours, or adds them to their sums along the row, or over the rows;
// 0 for those that `counts` has no bit of.
template <class T, int N>
FASTVAE_INLINE void put_gradients(const cuda::RowwiseArgs& a, int64_t row, int64_t col, int n,
                                  unsigned counts, T factor, const T (&grad)[N][width<T>],
                                  T (&sums)[N], T* over_rows = nullptr) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const bool dense = a.grad[j].data, along = a.sum[1 + j], over = over_rows && j == a.column;
    if (!dense && !along && !over) continue;
    T scaled[width<T>];
#pragma unroll
    for (int p = 0; p < width<T>; ++p) {  // not 0 · ∞: β may be 0 where the KL is infinite
      scaled[p] = (counts >> p & 1) && factor != T(0) ? factor * grad[j][p] : T(0);
      if (over) over_rows[p] += scaled[p];
      if (along) sums[j] += scaled[p];
    }
    if (dense) store<T>(a.grad[j], row * a.cols + col, n, scaled);
  }
}

// The sums of a chunk of a row, by the threads that shared it.
template <class T, bool Grad, int N>
FASTVAE_INLINE void put_sums(const cuda::RowwiseArgs& a, int64_t at, bool writes, T sum,
                             const T (&sums)[N], int lanes) {
  sum = sum_group(sum, lanes);
  if (writes) static_cast<T*>(a.sum[0])[at] = sum;
  if constexpr (Grad) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!a.sum[1 + j]) continue;
      const T total = sum_group(sums[j], lanes);
      if (writes) static_cast<T*>(a.sum[1 + j])[at] = total;
    }
  }
}

// Blocks that a multiprocessor holds at once: what that leaves of its registers suffices.
template <class F, class T>
constexpr int resident = (rare_inputs<F> == 0 ? 4 : 2) / (sizeof(T) == 8 ? 2 : 1);

template <class F, class T, bool Grad>
__global__ void __launch_bounds__(block_threads, resident<F, T>)
    rowwise_kernel(const __grid_constant__ cuda::RowwiseArgs a) {
  constexpr int N = inputs_of<F>, W = width<T>;
  __shared__ Packed<F, T> packed[packing_warps<F>];
  const Place place(a.split, a.rows, a.cols, W);
  Lane<T> options[max_options];
  load_options<F>(a, options);
  const T factor = Grad && place.exists ? row_factor<T>(a, place.row) : T(0);

  T sum = 0, sums[N] = {};
  const int64_t step = static_cast<int64_t>(a.split.lanes) * W;
  // A warp stays together where it packs.
  for (int64_t start = place.first - place.lane * W;; start += step) {
    const int64_t col = start + place.lane * W;
    const int n = neighbours<T>(col, place.end);
    if (rare_inputs<F> != 0 ? !__any_sync(0xffffffffu, n > 0) : n == 0) break;
    unsigned counts;
    T grad[N][W];
    sum += elements<F, T, Grad>(a, place.row, col, n, options, packed, counts, grad);
    if constexpr (Grad)
      if (n > 0) put_gradients<T>(a, place.row, col, n, counts, factor, grad, sums);
  }
  put_sums<T, Grad>(a, place.row * a.split.splits + place.split, place.exists && place.lane == 0,
                    sum, sums, a.split.lanes);
}

// The same where an input's gradient is summed over the rows: a block has some columns of several
// rows, and keeps their sums.
template <class F, class T>
__global__ void __launch_bounds__(block_threads,
                                  rare_inputs<F> == 0 && sizeof(T) == 4 ? 3 : resident<F, T>)
    columns_kernel(const __grid_constant__ cuda::RowwiseArgs a) {
  constexpr int N = inputs_of<F>, W = width<T>;
  __shared__ Packed<F, T> packed[packing_warps<F>];
  const int64_t block = blockIdx.x / a.split.splits, strip = blockIdx.x - block * a.split.splits;
  const int64_t col = strip * a.split.chunk + threadIdx.x * W;
  const int n = neighbours<T>(col, a.cols);
  const int64_t first = block * a.rows_at_once, end = first + a.rows_at_once;
  Lane<T> options[max_options];
  load_options<F>(a, options);

  T over_rows[W] = {};
  for (int64_t row = first; row < end && row < a.rows; ++row) {
    unsigned counts;
    T grad[N][W], sums[N] = {};
    const T sum = elements<F, T, true>(a, row, col, n, options, packed, counts, grad);
    if (n > 0)
      put_gradients<T>(a, row, col, n, counts, row_factor<T>(a, row), grad, sums, over_rows);
    put_sums<T, true>(a, row * a.split.splits + strip, threadIdx.x == 0, sum, sums, block_threads);
  }
#pragma unroll
  for (int p = 0; p < W; ++p)
    if (p < n) static_cast<T*>(a.over_rows)[block * a.cols + col + p] = over_rows[p];
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
