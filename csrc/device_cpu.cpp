// The CPU's kernels as the operators see them: tasks become pointers, partial sums are added up.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include "device_kernels.h"
#include "formulas/all.h"
#include "triton.h"

namespace fastvae {
namespace {

// What is summed in several parts, and those.
struct Parts {
  Tensor out;
  int64_t count;
  bool by_column;
  std::unique_ptr<double[]> values;

  Parts(Tensor out, int64_t count, bool by_column)
      : out(std::move(out)),
        count(count),
        by_column(by_column),
        values(new double[this->out.numel() * count]) {}
};

// Whether a site's planes lie end to end, and are so many that a vector of them is worth it.
bool reads_across_planes(const RowTask& task) {
  bool across = false;
  with_formula(task.spec.formula, [&](auto f) {
    using F = decltype(f);
    across = across_planes<F>;
    for (int j = 0; j < inputs_of<F>; ++j) {
      const Operand& in = task.in[j].operand;
      const auto& [out, along, planes_last] = task.grads[j];
      if (F::inputs[j].planes == 1) continue;
      across &= in.plane_stride == 1 && in.planes >= many_planes;
      across &= !out.defined() || planes_last || task.cols == 1;
    }
  });
  return across;
}

unsigned rowwise_cpu(const RowTask& task) {
  unsigned outside = 0;
  RowwiseArgs a{};
  a.formula = task.spec.formula;
  a.rows = task.rows;
  a.cols = task.cols;
  a.use_double = task.value.scalar_type() == at::kDouble;
  a.scale = task.scale;
  a.mask = task.mask.operand;
  a.weight = task.weight.operand;
  a.outside = &outside;
  std::copy(task.spec.options.begin(), task.spec.options.end(), a.options);
  for (int j = 0; j < max_inputs; ++j) {
    a.in[j] = task.in[j].operand;
    a.want_grad |= task.grads[j].out.defined();
    a.by_column |= task.grads[j].along == Along::columns;
  }
  if (task.sites) {
    a.across_planes = reads_across_planes(task);
    a.sites = sites_at_once(task.in[1].operand.planes, a.across_planes, a.rows * a.cols);
  }
  const Units units(a.rows, a.cols, a.by_column, a.sites);
  std::vector<Parts> parts;
  const auto in_parts = [&](const Tensor& out, int64_t count, bool by_column) {
    return parts.emplace_back(out, count, by_column).values.get();
  };
  const auto along_rows = [&](const Tensor& out) -> void* {
    return units.per_row == 1 ? out.mutable_data_ptr() : in_parts(out, units.per_row, false);
  };
  a.sum[0] = along_rows(task.value);
  for (int j = 0; j < max_inputs; ++j) {
    const auto& [out, along, planes_last] = task.grads[j];
    if (!out.defined()) continue;
    if (along == Along::both) a.grad[j] = {out.mutable_data_ptr(), dtype_of(out), planes_last};
    if (along == Along::rows) a.sum[1 + j] = along_rows(out);
    if (along == Along::columns) a.columns[j] = in_parts(dense_rows(out, 1), units.blocks, true);
  }
  kernels().rowwise(a);
  for (const Parts& p : parts) sum_parts(p.values.get(), p.count, p.out, p.by_column);
  return outside;
}

Stream stream_of(const SampleTask& task) {
  const auto key = static_cast<uint64_t>(*task.seed.const_data_ptr<int64_t>());
  const OptTensor& index = task.index;
  if (!index || index->numel() == 0) return {key, task.draws, task.offset, nullptr};
  const int64_t* row = index->const_data_ptr<int64_t>();
  bool in_order = true;
  for (int64_t b = 0; b < index->numel(); ++b) in_order &= row[b] - row[0] == b;
  if (in_order) return {key, task.draws, row[0], nullptr};
  return {key, task.draws, task.offset, row};
}

Output output(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }

void sample_cpu(const SampleForward& task) {
  SampleArgs a{};
  a.batch = task.batch;
  a.cols = task.cols;
  a.use_double = task.z.scalar_type() == at::kDouble;
  a.stream = stream_of(task);
  a.mu = task.mu.operand;
  a.logvar = task.logvar.operand;
  a.z = output(task.z);
  const int64_t per_row = chunks(a.cols);
  const bool want_kl = task.kl.defined();
  const std::unique_ptr<double[]> partial(want_kl ? new double[a.batch * per_row] : nullptr);
  a.kl = partial.get();
  kernels().sample(a);
  if (want_kl) sum_parts(a.kl, per_row, task.kl);
}

void sample_backward_cpu(const SampleBackward& task) {
  SampleBackwardArgs a{};
  a.batch = task.batch;
  a.cols = task.cols;
  a.use_double = task.grad_mu.scalar_type() == at::kDouble;
  a.stream = stream_of(task);
  a.mu = task.mu.operand;
  a.logvar = task.logvar.operand;
  a.grad_z = task.grad_z.operand;
  a.grad_kl = task.grad_kl.operand;
  a.grad_mu = output(task.grad_mu);
  a.grad_logvar = output(task.grad_logvar);
  kernels().sample_backward(a);
}

// In float64, sample by sample.
void elbo_reduce_cpu(const ReduceTask& task) {
  const int64_t batch = task.kl.size(0),
                samples = task.log_likelihood.dim() == 2 ? task.log_likelihood.size(0) : 1;
  std::vector<double> ll_row(batch, 0.0), kl_row(batch), w(batch, task.scale);
  with_values(task.log_likelihood, [&](const auto* p) {
    for (int64_t k = 0; k < samples; ++k)
      for (int64_t b = 0; b < batch; ++b)
        ll_row[b] += static_cast<double>(p[k * batch + b]) / samples;
  });
  with_values(task.kl, [&](const auto* p) {
    for (int64_t b = 0; b < batch; ++b) kl_row[b] = static_cast<double>(p[b]);
  });
  if (task.weight) {
    with_values(*task.weight, [&](const auto* p) {
      for (int64_t b = 0; b < batch; ++b) w[b] *= static_cast<double>(p[b]);
    });
  }
  const bool each = task.loss_out.dim() > 0;
  AT_DISPATCH_FLOATING_TYPES(task.loss_out.scalar_type(), "fastvae_elbo", [&] {
    auto* loss_out = task.loss_out.mutable_data_ptr<scalar_t>();
    auto* ll_out = task.log_likelihood_out.mutable_data_ptr<scalar_t>();
    auto* kl_out = task.kl_out.mutable_data_ptr<scalar_t>();
    double loss = 0, ll_sum = 0, kl_sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const double ll_b = w[b] * ll_row[b], kl_b = w[b] * kl_row[b];
      // The KL may be infinite.
      const double loss_b = (task.beta == 0 ? 0 : task.beta * kl_b) - ll_b;
      if (each) {
        loss_out[b] = static_cast<scalar_t>(loss_b);
        ll_out[b] = static_cast<scalar_t>(ll_b);
        kl_out[b] = static_cast<scalar_t>(kl_b);
      }
      loss += loss_b, ll_sum += ll_b, kl_sum += kl_b;
    }
    if (!each) {
      *loss_out = static_cast<scalar_t>(loss);
      *ll_out = static_cast<scalar_t>(ll_sum);
      *kl_out = static_cast<scalar_t>(kl_sum);
    }
  });
}

void scale_rows_cpu(const Tensor& grad, const Tensor& factor) {
  const int64_t rows = grad.size(0), cols = grad.size(1), step = factor.stride(0);
  const int64_t grain = at::internal::GRAIN_SIZE / std::max<int64_t>(cols, 1) + 1;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "fastvae_scale_rows", [&] {
        using Wide = at::opmath_type<scalar_t>;
        auto* to = grad.mutable_data_ptr<scalar_t>();
        with_values(factor, [&](const auto* by) {
          at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
            const auto scale = [&](scalar_t& g, Wide f) {
              g = f == Wide(0) ? scalar_t(0) : static_cast<scalar_t>(f * static_cast<Wide>(g));
            };
            if (cols == 1) {
              for (int64_t r = begin; r < end; ++r) scale(to[r], static_cast<Wide>(by[r * step]));
              return;
            }
            for (int64_t r = begin; r < end; ++r)
              for (int64_t c = 0; c < cols; ++c)
                scale(to[r * cols + c], static_cast<Wide>(by[r * step]));
          });
        });
      });
}

}  // namespace

const DeviceKernels cpu_device = {
    true, rowwise_cpu, sample_cpu, sample_backward_cpu, elbo_reduce_cpu, scale_rows_cpu};

const DeviceKernels& kernels_for(const Tensor& t) {
  if (triton::asked()) return triton_device;
#if defined(FASTVAE_CUDA_ON_CPU)  // tests/ptx: what CUDA runs, translated
  return cuda_device;
#endif
  if (!t.is_cuda()) return cpu_device;
#if defined(FASTVAE_CUDA)
  if (cuda_serves(t.get_device())) return cuda_device;
#endif
  return triton_device;
}

}  // namespace fastvae
