// Vector after vector of a row, and sums over them whose order is fixed.
#pragma once

#include "tiles.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

// Calls body(i, count) for each vector of [0, n). The count is a constant but for the last one,
// which may be partial.
template <class T, class S = T, class Body>
FASTVAE_INLINE void for_vectors(int64_t n, Body&& body) {
  constexpr int64_t width = parts<T, S> * Vec<T>::size();
  const int64_t whole = n - n % width;
  for (int64_t i = 0; i < whole; i += width) body(i, std::integral_constant<int64_t, width>{});
  if (whole < n) body(whole, n - whole);
}

// Sums vectors: at most 32 of them in the compute type, then in double lanes, in a fixed order.
template <class T>
class Sum {
  using V = Vec<T>;
  static constexpr int64_t width = V::size();

 public:
  Sum() {  // before torch 2.9 a Vectorized() is not zero
    for (F64& w : wide_) w = F64(0.0);
  }
  // Elements that may be added before a flush(), and before a flush_odds(): the product of 126
  // factors in [1, 2] is finite, and a logarithm costs as much as three vectors of the formula.
  static constexpr int64_t run = 32 * width, odds_run = 126 * width;

  FASTVAE_INLINE void add(const V& v) { sum_ = sum_ + v; }
  // Subtracts ln(1 + odds): 1 + odds multiplies a product, of which only what exceeds 1 is kept,
  // for then small odds lose nothing.
  FASTVAE_INLINE void subtract_log1p(const V& odds) { odds_.multiply(odds); }
  FASTVAE_INLINE void add_log1p(const V& gain) { gain_.multiply(gain); }
  FASTVAE_INLINE void flush() {
    add_wide(sum_, wide_);
    sum_ = V(T(0));
  }
  FASTVAE_INLINE void flush_odds() {
    if (odds_.used) add_wide(-log1p(odds_.beyond_one), wide_);
    if (gain_.used) add_wide(log1p(gain_.beyond_one), wide_);
    odds_ = gain_ = {};
  }
  double total() const {
    F64 sum = wide_[0];
    if constexpr (width > F64::size()) sum = sum + wide_[1];
    double lanes[F64::size()];
    sum.store(lanes);
    for (int half = F64::size() / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
  }

 private:
  struct Product {
    V beyond_one{T(0)};
    bool used = false;  // known at compile time once the loop is inlined
    FASTVAE_INLINE void multiply(const V& beyond) {
      beyond_one = fmadd(beyond_one, V(T(1)) + beyond, beyond);
      used = true;
    }
  };
  V sum_{T(0)};
  Product odds_, gain_;
  F64 wide_[width / F64::size()];
};

// Like for_vectors, with a Sum as third argument, whose total is returned.
template <class T, class S = T, class Body>
FASTVAE_INLINE double sum_vectors(int64_t n, Body&& body) {
  Sum<T> sum;
  for (int64_t first = 0; first < n;) {
    for (const int64_t end = std::min(n, first + Sum<T>::odds_run); first < end;) {
      const int64_t count = std::min(end - first, Sum<T>::run);
      for_vectors<T, S>(count, [&](int64_t i, auto size)
                                   __attribute__((always_inline)) { body(first + i, size, sum); });
      sum.flush();
      first += count;
    }
    sum.flush_odds();
  }
  return sum.total();
}

template <class T>
inline double sum_of(const T* values, int64_t n) {
  return sum_vectors<T>(n, [&](int64_t i, auto count, Sum<T>& sum) __attribute__((always_inline)) {
    sum.add(Vec<T>::loadu(values + i, count));
  });
}

// out[r] = Σ of row r, for rows that lie end to end. Of the shortest, a column of all rows is added
// at a time: a loop over three elements costs more than they do.
template <class T, class Out>
inline void sum_rows(const T* values, int64_t rows, int64_t cols, Out* out) {
  if (cols == 1) {
    std::copy_n(values, rows, out);
  } else if (cols < 8) {
    double sums[tile / 2];
    for (int64_t r = 0; r < rows; ++r) sums[r] = static_cast<double>(values[r * cols]);
    for (int64_t c = 1; c < cols; ++c)
      for (int64_t r = 0; r < rows; ++r) sums[r] += static_cast<double>(values[r * cols + c]);
    for (int64_t r = 0; r < rows; ++r) out[r] = static_cast<Out>(sums[r]);
  } else {
    for (int64_t r = 0; r < rows; ++r, values += cols) {
      double sum = 0;
      if (cols < 2 * Vec<T>::size())
        for (int64_t c = 0; c < cols; ++c) sum += static_cast<double>(values[c]);
      else
        sum = sum_of(values, cols);
      out[r] = static_cast<Out>(sum);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
