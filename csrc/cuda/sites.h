// The kernel of formulas with planes. Lanes are neighbouring sites, a thread each, which walks
// through their planes; or, where a site's planes lie end to end, they are the planes of one.
#pragma once

#include "rowwise.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// What a formula sees: one site, of which this thread has every plane, or where `step` threads
// share it, the planes that are so far apart.
template <class F, class T, int step>
class Site {
  static constexpr bool Across = step > 1;

 public:
  using V = Lane<T>;

  FASTVAE_INLINE Site(const cuda::RowwiseArgs& a, int64_t row, int64_t col, T factor, bool counts)
      : a_(a), row_(row), col_(col), factor_(factor), counts_(counts) {}

  FASTVAE_INLINE int64_t planes(int j) const { return (a_.in[j].planes + step - 1) / step; }
  FASTVAE_INLINE int64_t count(int j) const { return a_.in[j].planes; }
  FASTVAE_INLINE V in(int j, int64_t k) const {
    const Source& from = a_.in[j];
    int64_t plane = own(k);
    if (Across && plane >= from.planes) plane = from.planes - 1;
    const int64_t at = row_of(row_, from.period) * from.row_stride + col_ * from.col_stride +
                       plane * from.plane_stride;
    return V(j == 0 ? load_one<T>(from.data, from.dtype, at)
                    : load_float<T>(from.data, from.dtype, at));
  }
  FASTVAE_INLINE V option(int i) const { return num<V>(a_.options[i]); }
  FASTVAE_INLINE V index(int64_t k) const { return V(static_cast<T>(own(k))); }
  FASTVAE_INLINE V real(int64_t k, const V& v) const {
    return Across && own(k) >= a_.in[1].planes ? V(T(0)) : v;
  }
  FASTVAE_INLINE V sum(const V& v) const {
    return of_all(v, [](const V& a, const V& b) { return a + b; });
  }
  FASTVAE_INLINE V largest(const V& v) const {
    return of_all(v, [](const V& a, const V& b) { return max(a, b); });
  }
  FASTVAE_INLINE bool wants(int j) const { return a_.grad[j].data != nullptr; }
  FASTVAE_INLINE void grad(int j, int64_t k, const V& g) const {
    const Target& to = a_.grad[j];
    const int64_t plane = own(k), planes = a_.in[j].planes;
    if (Across && plane >= planes) return;
    const int64_t at = to.planes_last ? col_ * planes + plane : plane * a_.cols + col_;
    const T scaled = counts_ && factor_ != T(0) ? factor_ * g.v : T(0);
    store_one<T>(to.data, to.dtype, row_ * planes * a_.cols + at, scaled);
  }
  FASTVAE_INLINE void keep(int, int64_t, const V&) const {}
  template <class Again>
  FASTVAE_INLINE V kept(int, int64_t, Again&& again) const {
    return again();
  }

 private:
  static FASTVAE_INLINE int64_t own(int64_t k) {
    return Across ? k * step + threadIdx.x % step : k;
  }
  // What the site's threads have, put together in an order that is the same for each of them.
  template <class Fn>
  static FASTVAE_INLINE V of_all(V v, Fn&& put_together) {
    for (int other = 16; Across && other > 0; other /= 2)
      v = put_together(v, V(__shfl_xor_sync(0xffffffffu, v.v, other)));
    if constexpr (step > 32) {
      __shared__ T of_warp[step / 32];
      __syncthreads();  // what an earlier one read
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v.v;
      __syncthreads();
      v = V(of_warp[0]);
      for (int w = 1; w < step / 32; ++w) v = put_together(v, V(of_warp[w]));
    }
    return v;
  }

  const cuda::RowwiseArgs& a_;
  int64_t row_, col_;
  T factor_;
  bool counts_;
};

template <class F, class T, int step>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 8 ? 2 : 3)
    sites_kernel(const __grid_constant__ cuda::RowwiseArgs a) {
  const Place place(a.split, a.rows, a.cols * step, 1);
  const T factor = place.exists ? row_factor<T>(a, place.row) : T(0);
  T sum = 0;
  for (int64_t at = place.first; at < place.end; at += a.split.lanes) {
    const int64_t col = at / step;
    bool counts = true;
    if (a.mask.data)
      counts = load_one<T>(a.mask.data, DType::u8,
                           row_of(place.row, a.mask.period) * a.mask.row_stride +
                               col * a.mask.col_stride) != T(0);
    const T value = F::eval(Site<F, T, step>(a, place.row, col, factor, counts)).v;
    if (counts && at % step == 0) sum += value;
  }
  sum = sum_group(sum, a.split.lanes);
  if (place.exists && place.lane == 0)
    static_cast<T*>(a.sum[0])[place.row * a.split.splits + place.split] = sum;
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
