// elbo's small kernels: the reduction over the batch, the upstream gradient's product, second
// stages.
#pragma once

#include "memory.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

FASTVAE_INLINE double of_row(const Source& in, int64_t row) {
  return load_float<double>(in.data, in.dtype, row * in.row_stride);
}

// In float64, sample by sample; where they are summed, a sum for each block.
__global__ void __launch_bounds__(block_threads)
    elbo_reduce_kernel(const __grid_constant__ cuda::ReduceArgs a) {
  double loss = 0, log_likelihood = 0, kl = 0;
  const int64_t all = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x; b < a.batch;
       b += all) {
    double ll_b = 0;
    for (int64_t k = 0; k < a.num_samples; ++k)
      ll_b += of_row(a.log_likelihood, k * a.batch + b) / a.num_samples;
    const double w = a.weight.data ? a.scale * of_row(a.weight, b) : a.scale;
    ll_b *= w;
    const double kl_b = w * of_row(a.kl, b);
    const double loss_b = (a.beta == 0 ? 0 : a.beta * kl_b) - ll_b;  // the KL may be infinite
    if (a.each) {
      store_one<double>(a.loss.data, a.loss.dtype, b, loss_b);
      store_one<double>(a.log_likelihood_out.data, a.log_likelihood_out.dtype, b, ll_b);
      store_one<double>(a.kl_out.data, a.kl_out.dtype, b, kl_b);
    }
    loss += loss_b, log_likelihood += ll_b, kl += kl_b;
  }
  if (a.each) return;
  loss = sum_group(loss, block_threads);
  log_likelihood = sum_group(log_likelihood, block_threads);
  kl = sum_group(kl, block_threads);
  if (threadIdx.x != 0) return;
  if (a.loss.data) store_one<double>(a.loss.data, a.loss.dtype, blockIdx.x, loss);
  store_one<double>(a.log_likelihood_out.data, a.log_likelihood_out.dtype, blockIdx.x,
                    log_likelihood);
  store_one<double>(a.kl_out.data, a.kl_out.dtype, blockIdx.x, kl);
}

// grad *= factor, row by row; loss.backward() sends 1, and then there is nothing to do.
template <class T>
__global__ void __launch_bounds__(block_threads)
    scale_grad_kernel(const __grid_constant__ cuda::ScaleArgs a,
                      const __grid_constant__ cuda::Split split) {
  const Place place(split, a.rows, a.cols, width<T>);
  if (place.first >= place.end) return;
  const T factor = load_float<T>(a.factor.data, a.factor.dtype, place.row * a.factor.row_stride);
  if (factor == T(1)) return;
  Source grad;
  grad.data = a.grad.data;
  grad.dtype = a.grad.dtype;
  grad.vectors = a.grad.vectors;
  grad.row_stride = a.cols;
  grad.period = a.rows;
  for (int64_t col = place.first; col < place.end; col += split.lanes * width<T>) {
    const int n = place.end - col < width<T> ? static_cast<int>(place.end - col) : width<T>;
    Fetched<T> given;
    given.fetch(grad, floating(grad.dtype), place.row, col, n);
    T value[width<T>];
    given.understand(value);
    for (T& v : value) v = factor == T(0) ? T(0) : factor * v;
    store<T>(a.grad, place.row * a.cols + col, n, value);
  }
}

template <class T>
__global__ void __launch_bounds__(block_threads)
    sum_parts_kernel(const T* partial, int64_t count, int64_t parts, bool parts_first, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= count) return;
  double sum = 0;
  for (int64_t p = 0; p < parts; ++p)
    sum += static_cast<double>(partial[parts_first ? p * count + i : i * parts + p]);
  out[i] = static_cast<T>(sum);
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
