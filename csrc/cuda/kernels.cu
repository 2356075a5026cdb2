// Launches the kernels. Compiled once per formula (FASTVAE_FORMULA, its place in Formulas), and
// once without, for all that belongs to none.
#include "kernels.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#if defined(FASTVAE_FORMULA)
#include "sites.h"
#else
#include "elbo.h"
#include "sampling.h"
#endif

namespace fastvae {

// Compiled apart from one another.
template <class F>
void launch_rowwise(const cuda::RowwiseArgs& a, int64_t blocks, cudaStream_t stream);

namespace {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return;
  if (blocks >= int64_t{1} << 31)
    throw std::invalid_argument(
        "fastvae: a kernel has fewer than 2^31 blocks, these tensors need " +
        std::to_string(blocks));
  kernel<<<static_cast<unsigned>(blocks), block_threads, 0, stream>>>(args...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string("fastvae: a kernel could not be launched: ") +
                             cudaGetErrorString(error) +
                             (error == cudaErrorNoKernelImageForDevice
                                  ? ": build with this device's architecture in "
                                    "TORCH_CUDA_ARCH_LIST, or with FASTVAE_NO_CUDA=1 for Triton"
                                  : ""));
}

}  // namespace

#if defined(FASTVAE_FORMULA)

namespace {

template <class... F>
auto formula_at(List<F...>) -> std::tuple_element_t<FASTVAE_FORMULA, std::tuple<F...>>;

template <class F, class T>
void launch_as(const cuda::RowwiseArgs& a, int64_t blocks, cudaStream_t stream) {
  if constexpr (!has_planes<F> && inputs_of<F> > 2)
    if (a.column >= 0) return launch(columns_kernel<F, T>, blocks, stream, a);
  if constexpr (!has_planes<F>)
    launch(a.want_grad ? rowwise_kernel<F, T, true> : rowwise_kernel<F, T, false>, blocks, stream,
           a);
  else if (across_planes<F> && a.site_threads == 32)
    launch(sites_kernel < F, T, across_planes<F> ? 32 : 1 >, blocks, stream, a);
  else if (across_planes<F> && a.site_threads == block_threads)
    launch(sites_kernel < F, T, across_planes<F> ? block_threads : 1 >, blocks, stream, a);
  else
    launch(sites_kernel<F, T, 1>, blocks, stream, a);
}

}  // namespace

template <class F>
void launch_rowwise(const cuda::RowwiseArgs& a, int64_t blocks, cudaStream_t stream) {
  a.use_double ? launch_as<F, double>(a, blocks, stream) : launch_as<F, float>(a, blocks, stream);
}

template void launch_rowwise<decltype(formula_at(Formulas{}))>(const cuda::RowwiseArgs&, int64_t,
                                                               cudaStream_t);

#else

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t blocks_of(const cuda::Split& s, int64_t rows) {
  return ceil_div(rows * s.splits, block_threads / s.lanes);
}

// Of threads that go on to a next counter where there are too many.
int64_t stream_blocks(int64_t counters) {
  return std::min(ceil_div(counters, block_threads), 4 * cuda::enough_blocks);
}

}  // namespace

namespace cuda {

Split deal(int64_t rows, int64_t cols, int64_t per_thread) {
  const int64_t vectors = ceil_div(cols, per_thread);
  Split s;
  while (s.lanes > 1 && s.lanes / 2 >= vectors) s.lanes /= 2;
  const int64_t tile = s.lanes * per_thread, tiles = std::max<int64_t>(ceil_div(cols, tile), 1);
  const int64_t wanted = s.lanes < block_threads
                             ? 1
                             : std::min(tiles, ceil_div(enough_blocks, std::max<int64_t>(rows, 1)));
  s.chunk = ceil_div(tiles, wanted) * tile;
  s.splits = std::max<int64_t>(ceil_div(cols, s.chunk), 1);
  return s;
}

Split deal_columns(int64_t rows, int64_t cols, int64_t per_thread, int64_t& at_once) {
  Split s;
  s.chunk = block_threads * per_thread;
  s.splits = ceil_div(cols, s.chunk);
  const int64_t wanted = std::clamp<int64_t>(ceil_div(enough_column_blocks, s.splits), 1, rows);
  at_once = std::min(ceil_div(rows, wanted), most_rows_at_once);
  return s;
}

bool run_here() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, elbo_reduce_kernel);
  if (error != cudaSuccess) (void)cudaGetLastError();  // nobody else is to find it
  // What else can go wrong the first launch will say.
  return error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&
         error != cudaErrorUnsupportedPtxVersion;
}

void rowwise(const RowwiseArgs& a, cudaStream_t stream) {
  const int64_t blocks =
      a.column < 0 ? blocks_of(a.split, a.rows) : ceil_div(a.rows, a.rows_at_once) * a.split.splits;
  for_each_formula(Formulas{}, [&](int i, auto f) {
    if (i == a.formula) launch_rowwise<decltype(f)>(a, blocks, stream);
  });
}

void sample(const SampleArgs& a, cudaStream_t stream) {
  const bool whole = a.cols % philox_block == 0;
  const auto run = [&]<class T>(T) {
    if (a.counters > 0)
      return launch(sample_stream_kernel<T>,
                    std::max(stream_blocks(a.counters), blocks_of(a.split, a.kl ? a.batch : 0)),
                    stream, a);
    launch(whole ? sample_kernel<T, true> : sample_kernel<T, false>,
           blocks_of(a.split, a.batch * a.stream.num_samples), stream, a);
  };
  a.use_double ? run(0.0) : run(0.f);
}

void sample_backward(const SampleBackwardArgs& a, cudaStream_t stream) {
  const bool whole = a.cols % philox_block == 0;
  const auto run = [&]<class T>(T) {
    if (a.counters > 0)
      return launch(sample_stream_backward_kernel<T>, stream_blocks(a.counters), stream, a);
    launch(whole ? sample_backward_kernel<T, true> : sample_backward_kernel<T, false>,
           blocks_of(a.split, a.batch), stream, a);
  };
  a.use_double ? run(0.0) : run(0.f);
}

void elbo_reduce(const ReduceArgs& a, cudaStream_t stream) {
  launch(elbo_reduce_kernel, a.each ? ceil_div(a.batch, block_threads) : a.blocks, stream, a);
}

void scale_rows(const ScaleArgs& a, cudaStream_t stream) {
  const bool use_double = a.grad.dtype == DType::f64;
  const Split split = deal(a.rows, a.cols, per_thread(use_double));
  launch(use_double ? scale_grad_kernel<double> : scale_grad_kernel<float>,
         blocks_of(split, a.rows), stream, a, split);
}

void sum_parts(const void* partial, int64_t count, int64_t parts, bool parts_first, bool use_double,
               void* out, cudaStream_t stream) {
  const auto run = [&]<class T>(T) {
    launch(sum_parts_kernel<T>, ceil_div(count, block_threads), stream,
           static_cast<const T*>(partial), count, parts, parts_first, static_cast<T*>(out));
  };
  use_double ? run(0.0) : run(0.f);
}

}  // namespace cuda

#endif

}  // namespace fastvae
