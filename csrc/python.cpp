// The Python module: facts of the build, and the common calls of operators without torch.ops, which
// takes 2 to 3 µs to match the arguments to a schema.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "device_kernels.h"
#include "rowwise.h"
#include "triton.h"

namespace fastvae {
namespace {

namespace py = pybind11;

using Sample = std::tuple<Tensor, Tensor>;
using Terms = std::tuple<Tensor, Tensor, Tensor, Tensor>;

bool triton_serves = false;  // CUDA tensors: Python says so

bool is_served(const Tensor& t) {
#if defined(FASTVAE_CUDA)
  if (t.is_cuda() && cuda_serves(t.get_device())) return true;
#endif
  return t.is_cpu() || (t.is_cuda() && triton_serves);
}

// What these functions return where somebody else has to see the call (a subclass of Tensor, a
// mode, a transform), where it is not the common one, and where an operator refuses it: None. The
// caller then takes the long way, by its own checks and torch.ops.
template <class Result>
using Maybe = std::optional<Result>;

template <class Result, class Fn>
Maybe<Result> attempt(std::initializer_list<py::handle> tensors, Fn&& call) {
  if (at::impl::torch_function_mode_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      needs_composite({}))
    return std::nullopt;
  for (const py::handle t : tensors) {
    if (!THPVariable_CheckExact(t.ptr())) return std::nullopt;
    if (!is_served(THPVariable_Unpack(t.ptr()))) return std::nullopt;
  }
  try {
    const py::gil_scoped_release no_gil;
    return call();
  } catch (const c10::Error&) {  // Python's own errors, those of saved-tensor hooks, go through
    return std::nullopt;
  }
}

const Tensor& tensor(py::handle h) { return THPVariable_Unpack(h.ptr()); }

Tensor draw_seed(const Tensor& like) {
  static const auto op =
      typed_op<Tensor(const Tensor&, std::optional<at::Generator>)>("fastvae::seed");
  static const std::optional<at::Generator> torchs_own;
  return op.call(like, torchs_own);
}

// rsample and rsample_kl, which differ in what they return.
template <class Result>
Maybe<Result> sample(py::handle mu, py::handle logvar, py::handle sample_offset) {
  if (!PyLong_CheckExact(sample_offset.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t offset = PyLong_AsLongLongAndOverflow(sample_offset.ptr(), &overflow);
  if (overflow != 0) return std::nullopt;
  return attempt<Result>({mu, logvar}, [&]() -> Maybe<Result> {
    const Tensor &m = tensor(mu), &lv = tensor(logvar);
    // What would be refused must not move the generator.
    if (m.dim() == 0 || m.sizes() != lv.sizes() || m.scalar_type() != lv.scalar_type() ||
        m.device() != lv.device() || !m.is_floating_point())
      return std::nullopt;
    int64_t end = 0;
    if (offset < 0 || __builtin_add_overflow(offset, m.size(0), &end) ||
        __builtin_mul_overflow(end, product(m.sizes().slice(1)), &end))
      return std::nullopt;
    static const auto op = typed_op<Result(const Tensor&, const Tensor&, const Tensor&,
                                           std::optional<int64_t>, int64_t, const OptTensor&)>(
        std::is_same_v<Result, Tensor> ? "fastvae::rsample" : "fastvae::rsample_kl");
    return op.call(m, lv, draw_seed(m), std::nullopt, offset, {});
  });
}

Maybe<Terms> elbo(py::handle x, py::handle recon, py::handle kl, const std::string& family,
                  const std::vector<double>& options, double beta, const std::string& reduction) {
  return attempt<Terms>({x, recon, kl}, [&] {
    static const auto op = typed_op<Terms(
        const Tensor&, at::TensorList, const Tensor&, c10::string_view, at::ArrayRef<double>,
        const OptTensor&, const OptTensor&, double, c10::string_view)>("fastvae::elbo");
    return op.call(tensor(x), tensor(recon), tensor(kl), family, options, {}, {}, beta, reduction);
  });
}

// Adds what Triton makes another kernel for: a tensor's dtype, alignment and, on AMD's devices,
// whether 32 bits reach its end; an integer's width and whether it is 1 or a multiple of 16. False:
// it isn't known what it would.
bool add_to_key(std::string& key, PyObject* value) {
  if (value == Py_None) {
    key += 'n';
  } else if (PyTuple_CheckExact(value)) {
    key += '(';
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!add_to_key(key, PyTuple_GET_ITEM(value, i))) return false;
    key += ')';
  } else if (PyFloat_CheckExact(value)) {
    key += 'f';
  } else if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) return false;
    key += number == static_cast<int32_t>(number) ? 'i' : 'l';
    key += number == 1 ? '1' : number % 16 == 0 ? '6' : '0';
  } else if (THPVariable_Check(value)) {
    const Tensor& t = THPVariable_Unpack(value);
    key += 't';
    key += static_cast<char>('A' + static_cast<int>(t.scalar_type()));
    key += reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? '6' : '0';
    key += t.storage().nbytes() < size_t{1} << 31 ? 's' : 'l';
  } else {
    return false;
  }
  return true;
}

std::optional<std::string> launch_key(const py::tuple& arguments) {
  std::string key;
  if (!add_to_key(key, arguments.ptr())) return std::nullopt;
  return key;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTVAE_VERSION;
  info["compiler"] = __VERSION__;
  info["torch"] = TORCH_VERSION;
  info["isas"] = compiled_isas();
  info["isa"] = kernels().isa;
#if defined(FASTVAE_CUDA)
  info["cuda"] = FASTVAE_CUDA;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter,
                               const std::array<uint32_t, 2>& key) {
  std::array<uint32_t, 4> out{};
  kernels().philox(counter.data(), key.data(), out.data());
  return out;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The fastvae extension; importing it registers torch.ops.fastvae.";
  m.def("build_info", build_info);
  m.def("likelihoods", likelihood_names);
  m.def("empty_cache", empty_cache);
  m.def(
      "to_triton", triton::ask, py::arg("on"),
      "Whether this thread's tensors go to Triton's kernels, those of the CPU to its interpreter; "
      "returns what was before.");
#if defined(FASTVAE_CUDA)
  m.def("cuda_serves", cuda_serves, py::arg("device"),
        "Whether the kernels in CUDA C++ were compiled for that device's architecture.");
#endif
  m.def("serve_cuda", [] { triton_serves = true; }, "Triton has kernels for CUDA tensors.");
  m.def(
      "launch_key", launch_key, py::arg("arguments"),
      "Differs wherever Triton compiles another kernel for a launch's arguments; None: not known.");
  m.def("philox", philox, py::arg("counter"), py::arg("key"),
        "Philox4x32-10 by the vector kernel, for known-answer tests.");
  m.def("rsample", torch::wrap_pybind_function(sample<Tensor>));
  m.def("rsample_kl", torch::wrap_pybind_function(sample<Sample>));
  m.def("elbo", torch::wrap_pybind_function(elbo));
}

}  // namespace
}  // namespace fastvae
