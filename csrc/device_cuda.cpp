// The CUDA kernels as the operators see them: tasks become pointers and a stream.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "cuda/kernels.h"
#include "device_kernels.h"
#include "formulas/all.h"

namespace fastvae {
namespace {

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Whether `elements` neighbours, at any column that is a multiple of so many, are aligned as one.
bool aligned(const void* data, int64_t itemsize, int64_t row_stride, int64_t elements) {
  const int64_t bytes = itemsize * elements;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && row_stride * itemsize % bytes == 0;
}

cuda::Source source(const RowOperand& r, bool use_double) {
  cuda::Source s;
  if (!r.storage.defined()) return s;
  const Operand& o = r.operand;
  s.data = o.data;
  s.row_stride = o.row_stride;
  s.col_stride = o.col_stride;
  s.plane_stride = o.plane_stride;
  s.period = o.period;
  s.planes = o.planes;
  s.dtype = o.dtype;
  s.vectors = o.col_stride == 1 &&
              aligned(o.data, r.storage.element_size(), o.row_stride, cuda::per_thread(use_double));
  return s;
}

// A tensor as one column: contiguous, or of one dimension.
cuda::Source column(const OptTensor& t) {
  cuda::Source s;
  if (!t) return s;
  s.data = t->const_data_ptr();
  s.dtype = dtype_of(*t);
  s.row_stride = t->is_contiguous() ? 1 : t->stride(-1);
  s.col_stride = 0;
  s.period = std::max<int64_t>(1, t->numel());
  return s;
}

cuda::Target target(const Tensor& t, int64_t cols, bool use_double, bool planes_last = false) {
  void* data = t.mutable_data_ptr();
  const bool vectors = aligned(data, t.element_size(), cols, cuda::per_thread(use_double));
  return {data, dtype_of(t), vectors, planes_last};
}

// What is summed in several parts, to be added up behind the kernel.
class Stages {
 public:
  Stages(int64_t splits, bool use_double) : splits_(splits), use_double_(use_double) {}
  void* of(const Tensor& out) {
    if (splits_ == 1) return out.mutable_data_ptr();
    parts_.emplace_back(out, at::empty({out.numel(), splits_}, out.options()));
    return parts_.back().second.mutable_data_ptr();
  }
  void add_up() const {
    for (const auto& [out, parts] : parts_)
      cuda::sum_parts(parts.const_data_ptr(), out.numel(), splits_, false, use_double_,
                      out.mutable_data_ptr(), stream());
  }

 private:
  int64_t splits_;
  bool use_double_;
  std::vector<std::pair<Tensor, Tensor>> parts_;
};

// How many threads share a site: those of a block or a warp where its planes lie end to end and are
// that many.
int site_threads(const RowTask& task) {
  int threads = 1;
  with_formula(task.spec.formula, [&](auto f) {
    using F = decltype(f);
    bool across = across_planes<F>;
    int64_t planes = 0;
    for (int j = 0; j < inputs_of<F>; ++j) {
      if (F::inputs[j].planes == 1) continue;
      const auto& [out, along, planes_last] = task.grads[j];
      planes = task.in[j].operand.planes;
      across &= task.in[j].operand.plane_stride == 1;
      across &= !out.defined() || planes_last || task.cols == 1;
    }
    if (across && planes >= 32)
      threads = planes >= 4 * cuda::block_threads ? cuda::block_threads : 32;
  });
  return threads;
}

unsigned rowwise_cuda(const RowTask& task) {
  if (task.rows == 0) return no_rows(task);
  const c10::cuda::CUDAGuard device(task.value.device());
  cuda::RowwiseArgs a{};
  a.formula = task.spec.formula;
  a.rows = task.rows;
  a.cols = task.cols;
  a.use_double = task.value.scalar_type() == at::kDouble;
  a.scale = task.scale;
  a.site_threads = task.sites ? site_threads(task) : 1;
  const int64_t per_thread = task.sites ? 1 : cuda::per_thread(a.use_double);
  a.split = cuda::deal(a.rows, a.cols * a.site_threads, per_thread);
  // The first whose gradient is summed over the rows, if its columns fill half a block.
  a.column = -1;
  for (int j = max_inputs - 1; j > 1 && 2 * a.cols >= cuda::block_threads * per_thread; --j)
    if (task.grads[j].out.defined() && task.grads[j].along == Along::columns) a.column = j;
  if (a.column >= 0) a.split = cuda::deal_columns(a.rows, a.cols, per_thread, a.rows_at_once);
  std::copy(task.spec.options.begin(), task.spec.options.end(), a.options);
  a.mask = source(task.mask, a.use_double);
  a.mask.dtype = DType::u8;
  a.weight = source(task.weight, a.use_double);
  Stages stages(a.split.splits, a.use_double);
  a.sum[0] = stages.of(task.value);
  // Of gradients that are summed over the rows: those of a few rows each, or of each row.
  Tensor over_rows;
  std::vector<std::pair<Tensor, Tensor>> columns;
  for (int j = 0; j < max_inputs; ++j) {
    a.in[j] = source(task.in[j], a.use_double);
    const auto& [out, along, planes_last] = task.grads[j];
    if (!out.defined()) continue;
    a.want_grad = true;
    if (along == Along::rows) a.sum[1 + j] = stages.of(out);
    if (along == Along::both) a.grad[j] = target(out, a.cols, a.use_double, planes_last);
    if (j == a.column) {
      const int64_t blocks = (a.rows + a.rows_at_once - 1) / a.rows_at_once;
      over_rows = at::empty({blocks, a.cols}, out.options());
      a.over_rows = over_rows.mutable_data_ptr();
    } else if (along == Along::columns) {
      columns.emplace_back(dense_rows(out, 1)[0], at::empty({a.rows, a.cols}, out.options()));
      a.grad[j] = target(columns.back().second, a.cols, a.use_double);
    }
  }
  cuda::rowwise(a, stream());
  stages.add_up();
  if (over_rows.defined())
    cuda::sum_parts(over_rows.const_data_ptr(), a.cols, over_rows.size(0), true, a.use_double,
                    dense_rows(task.grads[a.column].out, 1).mutable_data_ptr(), stream());
  for (auto& [sum, each] : columns) at::sum_out(sum, each, 0);
  return 0;
}

// `draws`, of each sample: those that one thread has.
template <class Args>
void describe(const SampleTask& task, bool use_double, int64_t draws, Args& a) {
  a.batch = task.batch;
  a.cols = task.cols;
  a.use_double = use_double;
  // Rows of 64 have counters of their own anyhow. The KL is summed by rows.
  const int64_t per_sample = task.draws * task.cols;
  if (!task.index && task.cols % 64 != 0 && draws == task.draws)
    a.counters = (task.offset * per_sample % 64 + task.batch * per_sample + 63) / 64 * 16;
  // Each thread of a row's sum has a few of its columns.
  a.split = a.counters > 0 ? cuda::deal(task.batch, task.cols, 4)
                           : cuda::deal(task.batch * draws,
                                        task.cols % 64 == 0 ? task.cols / 4 : task.cols, 1);
  a.stream = {task.seed.const_data_ptr<int64_t>(), task.draws, task.offset,
              task.index && task.index->numel() ? task.index->const_data_ptr<int64_t>() : nullptr};
  a.mu = source(task.mu, use_double);
  a.logvar = source(task.logvar, use_double);
}

void sample_cuda(const SampleForward& task) {
  if (task.batch == 0) return;
  const c10::cuda::CUDAGuard device(task.z.device());
  const bool use_double = task.z.scalar_type() == at::kDouble;
  cuda::SampleArgs a{};
  describe(task, use_double, task.draws, a);
  a.z = target(task.z, a.cols, use_double);
  Stages stages(a.split.splits, use_double);
  if (task.kl.defined()) a.kl = stages.of(task.kl);
  cuda::sample(a, stream());
  stages.add_up();
}

void sample_backward_cuda(const SampleBackward& task) {
  if (task.grad_mu.numel() == 0) return;
  const c10::cuda::CUDAGuard device(task.grad_mu.device());
  const bool use_double = task.grad_mu.scalar_type() == at::kDouble;
  cuda::SampleBackwardArgs a{};
  describe(task, use_double, 1, a);
  if (!task.grad_z.storage.defined()) a.counters = 0;
  a.grad_z = source(task.grad_z, use_double);
  a.grad_kl = source(task.grad_kl, use_double);
  a.grad_mu = target(task.grad_mu, a.cols, use_double);
  a.grad_logvar = target(task.grad_logvar, a.cols, use_double);
  cuda::sample_backward(a, stream());
}

void elbo_reduce_cuda(const ReduceTask& task) {
  const c10::cuda::CUDAGuard device(task.kl.device());
  cuda::ReduceArgs a{};
  a.batch = task.kl.size(0);
  a.num_samples = task.log_likelihood.dim() == 2 ? task.log_likelihood.size(0) : 1;
  a.each = task.loss_out.dim() > 0;
  a.beta = task.beta;
  a.scale = task.scale;
  a.log_likelihood = column(task.log_likelihood);
  a.kl = column(task.kl);
  a.weight = column(task.weight);
  a.loss = target(task.loss_out, 1, true);
  a.log_likelihood_out = target(task.log_likelihood_out, 1, true);
  a.kl_out = target(task.kl_out, 1, true);
  a.blocks = cuda::reduce_blocks(a.batch);
  if (a.each || a.blocks == 1) return cuda::elbo_reduce(a, stream());
  // In two stages: the parts' sums are reduced as samples are, without weights.
  const Tensor parts = at::empty({2, a.blocks}, task.kl.options().dtype(at::kDouble));
  cuda::ReduceArgs first = a;
  first.loss.data = nullptr;
  first.log_likelihood_out = target(parts[0], 1, true);
  first.kl_out = target(parts[1], 1, true);
  cuda::elbo_reduce(first, stream());
  a.batch = a.blocks;
  a.num_samples = a.blocks = 1;
  a.scale = 1;
  a.log_likelihood = column(parts[0]);
  a.kl = column(parts[1]);
  a.weight = {};
  cuda::elbo_reduce(a, stream());
}

void scale_rows_cuda(const Tensor& grad, const Tensor& factor) {
  if (grad.numel() == 0) return;
  const c10::cuda::CUDAGuard device(grad.device());
  const bool use_double = grad.scalar_type() == at::kDouble;
  cuda::scale_rows(
      {grad.size(0), grad.size(1), target(grad, grad.size(1), use_double), column(factor)},
      stream());
}

}  // namespace

bool cuda_serves(int64_t device) {
  enum : char { unknown, yes, no };
  static std::array<std::atomic<char>, 128> known{};  // an index has 8 bits
  std::atomic<char>& answer = known.at(device);
  if (answer == unknown) {
    const c10::Device here(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
    const c10::cuda::CUDAGuard guard(here);
    answer = cuda::run_here() ? yes : no;
  }
  return answer == yes;
}

const DeviceKernels cuda_device = {
    false, rowwise_cuda, sample_cuda, sample_backward_cuda, elbo_reduce_cuda, scale_rows_cuda};

}  // namespace fastvae
