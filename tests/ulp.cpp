// Largest errors of the float32 vocabulary in csrc/math/math.h and compounds.h, against double precision.
//   ulp STEP [OFFSET]: every STEP-th of the 2^32 bit patterns; prints "name ulp at count" per line.
#include "math/compounds.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "formulas/bernoulli.h"

using namespace fastvae;

namespace {

// The error in units of the last place of the exact result; 2^−149 among the subnormals.
double error(float got, double exact) {
  if (std::isnan(exact) || std::isnan(got))
    return std::isnan(exact) == std::isnan(got) ? 0 : HUGE_VAL;
  if (std::isinf(exact)) return got == exact ? 0 : HUGE_VAL;
  const double value = std::isinf(got) ? std::copysign(0x1p128, got) : got;
  if (std::isinf(got) && std::isinf(static_cast<float>(exact)))
    return got * exact > 0 ? 0 : HUGE_VAL;
  int exponent;
  std::frexp(exact, &exponent);
  return std::fabs(value - exact) / std::ldexp(1.0, std::max(std::min(exponent, 128) - 24, -149));
}

double phi(double d) {  // e^d − 1 − d
  if (!(std::fabs(d) < 0.25)) return std::isinf(d) && d > 0 ? d : std::expm1(d) - d;
  double term = d * d / 2, sum = 0;
  for (int k = 3; k < 16; ++k) sum += term, term *= d / k;
  return sum;
}

double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

template <class Function, class Exact>
void sweep(const char* name, uint64_t step, uint64_t offset, float low, float high,
           Function&& function, Exact&& exact, bool absolute = false) {
  constexpr int block = 4096;
  double worst = 0;
  float where = 0;
  uint64_t count = 0;
  const int64_t blocks = ((uint64_t{1} << 32) - offset + step * block - 1) / (step * block);
#pragma omp parallel for schedule(dynamic, 16) reduction(+ : count)
  for (int64_t b = 0; b < blocks; ++b) {
    float x[block], got[block];
    int n = 0;
    for (int i = 0; i < block; ++i) {
      const uint64_t pattern = offset + (b * block + i) * step;
      if (pattern >> 32) break;
      const auto bits = static_cast<uint32_t>(pattern);
      std::memcpy(x + n, &bits, sizeof bits);
      if ((x[n] >= low && x[n] <= high) || (x[n] != x[n] && low <= -std::numeric_limits<float>::max())) ++n;
    }
    count += n;
    for (int i = n; i < block && i % F32::size(); ++i) x[i] = 0;
    for (int i = 0; i < n; i += F32::size()) function(F32::loadu(x + i)).store(got + i);
    for (int i = 0; i < n; ++i) {
      const double e = absolute ? std::fabs(got[i] - exact(x[i])) : error(got[i], exact(x[i]));
      if (e > worst) {
#pragma omp critical
        if (e > worst) worst = e, where = x[i];
      }
    }
  }
  std::printf("%s %.4g %a %llu\n", name, worst, where, static_cast<unsigned long long>(count));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t step = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1021;
  const uint64_t offset = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const float all = HUGE_VALF;
  auto run = [&](const char* name, float low, float high, auto&& function, auto&& exact) {
    sweep(name, step, offset, low, high, function, exact);
  };
  run("exp", -all, all, [](F32 x) { return exp(x); }, [](double x) { return std::exp(x); });
  run(
      "exp_negative", -all, 0, [](F32 x) { return exp_negative(x); },
      [](double x) { return std::exp(x); });
  run("log", -all, all, [](F32 x) { return log(x); }, [](double x) { return std::log(x); });
  run(
      "log_unit", 0x1p-32f, 1, [](F32 x) { return log_unit(x); },
      [](double x) { return std::log(x); });
  run("log1p", -all, all, [](F32 x) { return log1p(x); }, [](double x) { return std::log1p(x); });
  // Over finite values and NaN: at infinity these are ∞ − ∞, NaN, as torch's own formulas are.
  const float finite = std::numeric_limits<float>::max();
  run(
      "phi", -finite, finite, [](F32 x) { return half_phi_expm1(x).phi; },
      [](double x) { return phi(x) / 2; });
  // 0 where φ ≥ 0, which is what its rounding must not break.
  run(
      "phi_negative", -all, all,
      [](F32 x) { return select(less(half_phi_expm1(x).phi, F32(0.f)), F32(1.f), F32(0.f)); },
      [](double) { return 0.0; });
  run(
      "expm1", -all, all, [](F32 x) { return half_phi_expm1(x).expm1; },
      [](double x) { return std::expm1(x) / 2; });
  for (const float target : {0.f, 1.f}) {
    const double sign = target == 1 ? 1 : -1;
    auto eval = [=](F32 l) {
      const F32 in[2] = {F32(target), l};
      return Bernoulli::eval<F32>(in, nullptr);
    };
    run(
        target == 1 ? "bernoulli_value_1" : "bernoulli_value_0", -finite, finite,
        [=](F32 l) {
          const auto r = eval(l);
          return r.value - log1p(r.odds);
        },
        [=](double l) { return -softplus(-sign * l); });
    run(
        target == 1 ? "bernoulli_grad_1" : "bernoulli_grad_0", -all, all,
        [=](F32 l) { return eval(l).grad[1]; },
        [=](double l) { return sign / (1 + std::exp(sign * l)); });
  }
  const double pi = 3.14159265358979323846;
  sweep(
      "sinpi_absolute", step, offset, -1, 1, [](F32 t) { return sincospi(t).sin; },
      [=](double t) { return std::sin(pi * t); }, true);
  sweep(
      "cospi_absolute", step, offset, -1, 1, [](F32 t) { return sincospi(t).cos; },
      [=](double t) { return std::cos(pi * t); }, true);
}
