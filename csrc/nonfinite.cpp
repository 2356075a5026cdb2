// count_nonfinite: the counters behind ELBOLoss.check(). On other devices it is a handful of
// torch's ops, in fastvae/_backends/eager.py.
#include <array>
#include <cmath>

#include "common.h"

namespace fastvae {
namespace {

// The state, [5, terms]: rows that were bad, call and row of the first, all calls, all rows.
enum Counter { bad, first_call, first_row, calls, total };
constexpr int64_t terms = 3;  // ln p, KL, weight

// Which of the rows [batch], or columns of [samples, batch], hold NaN or infinity: how many, and
// the first.
std::pair<int64_t, int64_t> bad_rows(const Tensor& t, int64_t batch) {
  int64_t count = 0, first = 0;
  with_values(t.contiguous(), [&](const auto* p) {
    const int64_t draws = t.numel() / batch;
    for (int64_t b = batch - 1; b >= 0; --b) {
      bool finite = true;
      for (int64_t k = 0; k < draws; ++k)
        finite &= std::isfinite(static_cast<double>(p[k * batch + b]));
      if (!finite) ++count, first = b;
    }
  });
  return {count, first};
}

void count_nonfinite_cpu(const Tensor& state, const Tensor& rows, const Tensor& kl,
                         const OptTensor& weight) {
  TORCH_CHECK_TYPE(state.scalar_type() == at::kLong, "state must be int64, got ",
                   state.scalar_type());
  TORCH_CHECK_VALUE(state.sizes() == at::IntArrayRef({5, terms}) && state.is_contiguous(),
                    "state must be a contiguous tensor of shape [5, 3], got ", state.sizes());
  check_dense(rows, "rows");
  TORCH_CHECK_VALUE(rows.dim() == 1 || rows.dim() == 2,
                    "rows must have shape [batch] or [samples, batch], got ", rows.sizes());
  const int64_t batch = rows.sizes().back();
  if (batch == 0) return;
  const std::array<OptTensor, terms> values{rows, kl, weight};
  const char* names[] = {"rows", "kl", "weight"};
  for (int64_t i = 0; i < terms; ++i) {
    if (!values[i]) continue;
    const Tensor& t = *values[i];
    check_device(t, names[i], state);
    check_dense(t, names[i]);
    check_floating(t, names[i]);
    TORCH_CHECK_VALUE(i == 0 || t.sizes() == at::IntArrayRef({batch}), names[i],
                      " must have shape [", batch, "], got ", t.sizes());
  }
  auto* const state_data = state.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < terms; ++i) {
    auto at = [&](Counter c) -> int64_t& { return state_data[c * terms + i]; };
    if (values[i]) {
      const auto [count, first] = bad_rows(*values[i], batch);
      if (count && at(bad) == 0) at(first_call) = at(calls), at(first_row) = first;
      at(bad) += count;
    }
    at(calls) += 1;
    at(total) += batch;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastvae, CPU, m) { m.impl("count_nonfinite", count_nonfinite_cpu); }
TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("count_nonfinite", torch::CppFunction::makeFallthrough());  // of values alone
}

}  // namespace fastvae
