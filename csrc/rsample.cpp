// rsample and rsample_kl, with the seed and the noise they use: implementations, autograd, routing.
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "device_kernels.h"
#include "ops.h"
#include "triton.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Below autograd the KL is optional: rsample and rsample_kl are one kernel.
using SampleResult = std::tuple<Tensor, Tensor>;

constexpr int64_t seed_range = std::numeric_limits<int64_t>::max();

// A tensor on the device, which no host waits for: safe in CUDA graphs.
Tensor seed_cuda(const Tensor& like, std::optional<at::Generator> generator) {
  return at::randint(seed_range, {1}, generator, like.options().dtype(at::kLong));
}

Tensor seed_cpu(const Tensor&, std::optional<at::Generator> generator) {
  auto* g = at::get_generator_or_default<at::CPUGeneratorImpl>(
      generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(g->mutex_);
  const Tensor seed = empty({1}, at::kLong, at::kCPU);
  // What torch.randint(2**63 - 1, (1,)) gives, so that every route draws the same.
  *seed.mutable_data_ptr<int64_t>() = static_cast<int64_t>(g->random64() % seed_range);
  return seed;
}

// The stream's elements have 64-bit indices; beyond, rows would share their noise. Another device
// would have to be waited for.
void check_range(const Tensor& index, int64_t num_samples, int64_t cols) {
  if (!index.is_cpu()) return;
  const int64_t limit =
      std::numeric_limits<int64_t>::max() / num_samples / std::max<int64_t>(cols, 1);
  const int64_t* row = index.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < index.numel(); ++b)
    TORCH_CHECK_VALUE(row[b] >= 0 && row[b] < limit, "sample_index must be at least 0 and below ",
                      limit, ", got ", row[b], " in row ", b);
}

// Returns the index, contiguous.
OptTensor check_sampling(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                         int64_t num_samples, int64_t sample_offset,
                         const OptTensor& sample_index) {
  check_device(logvar, "logvar", mu);
  check_device(seed, "seed", mu);
  check_dense(mu, "mu");
  check_dense(logvar, "logvar");
  check_floating(mu, "mu");
  check_same_shape(mu, "mu", logvar, "logvar");
  TORCH_CHECK_TYPE(mu.scalar_type() == logvar.scalar_type(),
                   "mu and logvar must have the same dtype, got ", mu.scalar_type(), " and ",
                   logvar.scalar_type());
  TORCH_CHECK_VALUE(mu.dim() >= 1, "mu must have a batch dimension, got ", mu.sizes());
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "seed must be int64, got ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.numel() == 1, "seed must hold one element, got ", seed.sizes());
  TORCH_CHECK_VALUE(num_samples >= 1, "num_samples must be at least 1, got ", num_samples);
  TORCH_CHECK_VALUE(sample_offset >= 0, "sample_offset must be at least 0, got ", sample_offset);
  OptTensor index;
  if (sample_index) {
    check_device(*sample_index, "sample_index", mu);
    check_dense(*sample_index, "sample_index");
    TORCH_CHECK_TYPE(sample_index->scalar_type() == at::kLong, "sample_index must be int64, got ",
                     sample_index->scalar_type());
    TORCH_CHECK_VALUE(sample_index->dim() == 1 && sample_index->size(0) == mu.size(0),
                      "sample_index must have shape [", mu.size(0), "], one per sample, got ",
                      sample_index->sizes());
    TORCH_CHECK_VALUE(sample_offset == 0, "give either sample_offset or sample_index, got both");
    index = sample_index->contiguous();
    check_range(*index, num_samples, product(mu.sizes().slice(1)));
  }
  int64_t end = 0;  // the stream's indices are 64-bit
  const bool too_far = __builtin_add_overflow(sample_offset, mu.size(0), &end) ||
                       __builtin_mul_overflow(end, num_samples, &end) ||
                       __builtin_mul_overflow(end, product(mu.sizes().slice(1)), &end);
  TORCH_CHECK_VALUE(!too_far, "sample_offset and num_samples must keep the stream below 2^63, got ",
                    sample_offset, " and ", num_samples);
  return index;
}

OptTensor defined(const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }

std::vector<int64_t> sample_sizes(const Tensor& mu, std::optional<int64_t> num_samples) {
  std::vector<int64_t> sizes = mu.sizes().vec();
  if (num_samples) sizes.insert(sizes.begin(), *num_samples);
  return sizes;
}

// The checked rows of mu and logvar and their draws.
SampleTask sample_task(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t draws,
                       int64_t offset, const OptTensor& sample_index) {
  OptTensor index = check_sampling(mu, logvar, seed, draws, offset, sample_index);
  const bool host = kernels_for(mu).host;
  return {mu.size(0),           product(mu.sizes().slice(1)), draws, offset, seed, std::move(index),
          as_rows(mu, 1, host), as_rows(logvar, 1, host)};
}

SampleResult sample_fused(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                          std::optional<int64_t> num_samples, int64_t sample_offset,
                          const OptTensor& sample_index, bool want_kl) {
  SampleForward task{
      sample_task(mu, logvar, seed, num_samples.value_or(1), sample_offset, sample_index)};
  task.z = empty(sample_sizes(mu, num_samples), mu.scalar_type(), mu.device());
  if (want_kl) task.kl = empty(mu.sizes().slice(0, 1), compute_type(mu.scalar_type()), mu.device());
  kernels_for(mu).sample(task);
  return {std::move(task.z), std::move(task.kl)};
}

Tensor rsample_fused(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                     std::optional<int64_t> num_samples, int64_t sample_offset,
                     const OptTensor& sample_index) {
  return std::get<0>(
      sample_fused(mu, logvar, seed, num_samples, sample_offset, sample_index, false));
}

SampleResult rsample_kl_fused(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                              std::optional<int64_t> num_samples, int64_t sample_offset,
                              const OptTensor& sample_index) {
  return sample_fused(mu, logvar, seed, num_samples, sample_offset, sample_index, true);
}

// μ and logvar of N(0, 1), one element in memory.
Tensor zeros_of(const Tensor& seed, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(!size.empty() && *std::min_element(size.begin(), size.end()) >= 0,
                    "size must be a batch and event sizes, none negative, got ", size);
  return at::zeros({1}, seed.options().dtype(at::kFloat)).expand({product(size)}).view(size);
}

// ε alone: the sample of N(0, 1).
Tensor noise_fused(const Tensor& seed, at::IntArrayRef size, int64_t num_samples,
                   int64_t sample_offset, const OptTensor& sample_index) {
  const Tensor zero = zeros_of(seed, size);
  return rsample_fused(zero, zero, seed, num_samples, sample_offset, sample_index);
}

// ε for each of several seeds, [seeds, …]: what vmap asks for.
Tensor noise_each_fused(const Tensor& seeds, at::IntArrayRef size, int64_t num_samples,
                        int64_t sample_offset, const OptTensor& sample_index) {
  TORCH_CHECK_VALUE(seeds.dim() == 1, "seeds must have one dimension, got ", seeds.sizes());
  const int64_t lanes = seeds.size(0);
  const Tensor zero = zeros_of(seeds, size);
  std::vector<int64_t> sizes = sample_sizes(zero, num_samples);
  sizes.insert(sizes.begin(), lanes);
  const Tensor out = empty(sizes, at::kFloat, seeds.device());
  if (lanes == 0) return out;
  SampleForward task{
      sample_task(zero, zero, seeds.slice(0, 0, 1), num_samples, sample_offset, sample_index)};
  for (int64_t i = 0; i < lanes; ++i) {
    task.seed = seeds.slice(0, i, i + 1);
    task.z = out[i];
    kernels_for(seeds).sample(task);
  }
  return out;
}

std::tuple<Tensor, Tensor> rsample_backward_fused(const OptTensor& grad_z, const OptTensor& grad_kl,
                                                  const Tensor& mu, const Tensor& logvar,
                                                  const Tensor& seed,
                                                  std::optional<int64_t> num_samples,
                                                  int64_t sample_offset,
                                                  const OptTensor& sample_index) {
  SampleBackward task{
      sample_task(mu, logvar, seed, num_samples.value_or(1), sample_offset, sample_index)};
  const DeviceKernels& device = kernels_for(mu);
  if (grad_z) {
    check_device(*grad_z, "grad_z", mu);
    check_floating(*grad_z, "grad_z");
    TORCH_CHECK_VALUE(grad_z->sizes() == at::IntArrayRef(sample_sizes(mu, num_samples)),
                      "grad_z must have the shape of z, got ", grad_z->sizes());
    task.grad_z = as_rows(*grad_z, num_samples ? 2 : 1, device.host);
  }
  if (grad_kl) {
    check_device(*grad_kl, "grad_kl", mu);
    check_floating(*grad_kl, "grad_kl");
    TORCH_CHECK_VALUE(grad_kl->dim() == 1 && grad_kl->size(0) == mu.size(0),
                      "grad_kl must have shape [", mu.size(0), "], got ", grad_kl->sizes());
    task.grad_kl = as_rows(*grad_kl, 1);
  }
  task.grad_mu = empty(mu.sizes(), mu.scalar_type(), mu.device());
  task.grad_logvar = empty(mu.sizes(), mu.scalar_type(), mu.device());
  device.sample_backward(task);
  return {std::move(task.grad_mu), std::move(task.grad_logvar)};
}

// --- composites ---

Tensor rsample_composite(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                         std::optional<int64_t> num_samples, int64_t sample_offset,
                         const OptTensor& sample_index) {
  static const auto op = typed_op<decltype(rsample_composite)>("fastvae::rsample_composite");
  return op.call(mu, logvar, seed, num_samples, sample_offset, sample_index);
}

SampleResult rsample_kl_composite(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                  std::optional<int64_t> num_samples, int64_t sample_offset,
                                  const OptTensor& sample_index) {
  return {rsample_composite(mu, logvar, seed, num_samples, sample_offset, sample_index),
          kl_divergence_composite(mu, logvar, {}, {}, {})};
}

// --- autograd ---

// The backward of rsample and rsample_kl; ε is drawn again, nothing but the inputs was saved.
variable_list sample_grads(AutogradContext* ctx, const Tensor& grad_z, const Tensor& grad_kl) {
  const triton::Asked where(triton::remembered(ctx));
  const auto saved = ctx->get_saved_variables();
  const Tensor &mu = saved[0], &logvar = saved[1], &seed = saved[2];
  const OptTensor index = defined(saved[3]);
  const auto num_samples = ctx->saved_data["num_samples"].toOptional<int64_t>();
  const int64_t offset = ctx->saved_data["sample_offset"].toInt();
  variable_list grads(6);
  if (!grad_z.defined() && !grad_kl.defined()) return grads;
  if (needs_composite_backward({grad_z, grad_kl}, {mu, logvar})) {
    const auto values = [&](at::TensorList in) {
      std::vector<Tensor> out;
      if (grad_z.defined())
        out.push_back(rsample_composite(in[0], in[1], seed, num_samples, offset, index));
      if (grad_kl.defined()) out.push_back(rowwise_composite(kl_spec(2), in, {}));
      return out;
    };
    std::vector<Tensor> factors;
    for (const Tensor& g : {grad_z, grad_kl})
      if (g.defined()) factors.push_back(g);
    auto made = composite_grads(values, {mu, logvar}, {true, true}, factors);
    std::move(made.begin(), made.end(), grads.begin());
    return grads;
  }
  at::AutoDispatchBelowAutograd guard;
  static const auto op = typed_op<decltype(rsample_backward_fused)>("fastvae::rsample_backward");
  std::tie(grads[0], grads[1]) =
      op.call(defined(grad_z), defined(grad_kl), mu, logvar, seed, num_samples, offset, index);
  return grads;
}

void save_sample(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                 std::optional<int64_t> num_samples, int64_t sample_offset,
                 const OptTensor& sample_index) {
  triton::remember(ctx);
  ctx->set_materialize_grads(false);
  ctx->save_for_backward({mu, logvar, seed, sample_index.value_or(Tensor())});
  ctx->saved_data["num_samples"] = num_samples;
  ctx->saved_data["sample_offset"] = sample_offset;
}

struct Rsample : torch::autograd::Function<Rsample> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                        const Tensor& seed, std::optional<int64_t> num_samples,
                        int64_t sample_offset, const OptTensor& sample_index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_sample(ctx, mu, logvar, seed, num_samples, sample_offset, sample_index);
    static const auto op = typed_op<decltype(rsample_fused)>("fastvae::rsample");
    return op.call(mu, logvar, seed, num_samples, sample_offset, sample_index);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    return sample_grads(ctx, upstream[0], Tensor());
  }
};

struct RsampleKL : torch::autograd::Function<RsampleKL> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const Tensor& seed, std::optional<int64_t> num_samples,
                               int64_t sample_offset, const OptTensor& sample_index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_sample(ctx, mu, logvar, seed, num_samples, sample_offset, sample_index);
    static const auto op = typed_op<decltype(rsample_kl_fused)>("fastvae::rsample_kl");
    auto [z, kl] = op.call(mu, logvar, seed, num_samples, sample_offset, sample_index);
    return {z, kl};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    return sample_grads(ctx, upstream[0], upstream[1]);
  }
};

Tensor rsample_autograd(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                        std::optional<int64_t> num_samples, int64_t sample_offset,
                        const OptTensor& sample_index) {
  if (needs_composite({mu, logvar}))
    return rsample_composite(mu, logvar, seed, num_samples, sample_offset, sample_index);
  return Rsample::apply(mu, logvar, seed, num_samples, sample_offset, sample_index);
}

SampleResult rsample_kl_autograd(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                 std::optional<int64_t> num_samples, int64_t sample_offset,
                                 const OptTensor& sample_index) {
  if (needs_composite({mu, logvar}))
    return rsample_kl_composite(mu, logvar, seed, num_samples, sample_offset, sample_index);
  auto out = RsampleKL::apply(mu, logvar, seed, num_samples, sample_offset, sample_index);
  return {out[0], out[1]};
}

void rsample_implementations(torch::Library& m) {
  m.impl("noise", noise_fused);
  m.impl("noise_each", noise_each_fused);
  m.impl("rsample", rsample_fused);
  m.impl("rsample_kl", rsample_kl_fused);
  m.impl("rsample_backward", rsample_backward_fused);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) {
  rsample_implementations(m);
  m.impl("seed", seed_cpu);
}
TORCH_LIBRARY_IMPL(fastvae, CUDA, m) {
  rsample_implementations(m);
  m.impl("seed", seed_cuda);
}

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("seed", torch::CppFunction::makeFallthrough());  // integers: nothing to differentiate
  m.impl("noise", torch::CppFunction::makeFallthrough());
  m.impl("noise_each", torch::CppFunction::makeFallthrough());
  m.impl("rsample", rsample_autograd);
  m.impl("rsample_kl", rsample_kl_autograd);
}

TORCH_LIBRARY_IMPL(fastvae, FuncTorchBatchedDecomposition, m) {
  m.impl("rsample", rsample_composite);
  m.impl("rsample_kl", rsample_kl_composite);
}

}  // namespace fastvae
