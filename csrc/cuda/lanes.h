// Lanes on a GPU: one number, whose neighbours are the other threads'. The same vocabulary as
// cpu/lanes.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../formulas/formula.h"

namespace fastvae {
inline namespace CPU_CAPABILITY {

template <class T>
struct Lane {
  using value_type = T;
  T v;

  Lane() = default;
  explicit constexpr FASTVAE_INLINE Lane(T value) : v(value) {}
  static constexpr FASTVAE_INLINE int size() { return 1; }

  friend FASTVAE_INLINE Lane operator+(const Lane& a, const Lane& b) { return Lane(a.v + b.v); }
  friend FASTVAE_INLINE Lane operator-(const Lane& a, const Lane& b) { return Lane(a.v - b.v); }
  friend FASTVAE_INLINE Lane operator*(const Lane& a, const Lane& b) { return Lane(a.v * b.v); }
  friend FASTVAE_INLINE Lane operator/(const Lane& a, const Lane& b) { return Lane(a.v / b.v); }
  FASTVAE_INLINE Lane operator-() const { return Lane(-v); }

  FASTVAE_INLINE Lane round() const { return Lane(::rint(v)); }
  FASTVAE_INLINE Lane sqrt() const { return Lane(::sqrt(v)); }
  FASTVAE_INLINE Lane exp() const { return Lane(::exp(v)); }
  FASTVAE_INLINE Lane log() const { return Lane(::log(v)); }
  FASTVAE_INLINE Lane log1p() const { return Lane(::log1p(v)); }
};

using F32 = Lane<float>;
using F64 = Lane<double>;
using I32 = Lane<int32_t>;

FASTVAE_INLINE I32 operator&(const I32& a, const I32& b) { return I32(a.v & b.v); }
FASTVAE_INLINE I32 operator^(const I32& a, const I32& b) { return I32(a.v ^ b.v); }
FASTVAE_INLINE I32 operator>>(const I32& a, const I32& b) { return I32(a.v >> b.v); }
FASTVAE_INLINE I32 operator<<(const I32& a, const I32& b) {
  return I32(static_cast<int32_t>(static_cast<uint32_t>(a.v) << b.v));
}

template <class V>
FASTVAE_INLINE V num(double v) {
  return V(static_cast<typename V::value_type>(v));
}

// The same bits as another type; and conversions by value, to integers towards 0.
FASTVAE_INLINE I32 as_ints(const F32& x) { return I32(__float_as_int(x.v)); }
FASTVAE_INLINE F32 as_floats(const I32& x) { return F32(__int_as_float(x.v)); }
FASTVAE_INLINE F32 to_floats(const I32& x) { return F32(__int2float_rn(x.v)); }
FASTVAE_INLINE I32 to_ints(const F32& x) { return I32(__float2int_rz(x.v)); }
// The nearest integers, ties to even.
FASTVAE_INLINE I32 nearest(const F32& x) { return I32(__float2int_rn(x.v)); }

FASTVAE_INLINE F32 operator^(const F32& a, const F32& b) {
  return as_floats(as_ints(a) ^ as_ints(b));
}
FASTVAE_INLINE F32 operator|(const F32& a, const F32& b) {
  return as_floats(I32(as_ints(a).v | as_ints(b).v));
}
FASTVAE_INLINE F64 operator|(const F64& a, const F64& b) {
  return F64(__longlong_as_double(__double_as_longlong(a.v) | __double_as_longlong(b.v)));
}

// Comparisons with NaN are false.
template <class V>
using Mask = bool;
template <class V>
FASTVAE_INLINE bool less(const V& a, const V& b) {
  return a.v < b.v;
}
template <class V>
FASTVAE_INLINE bool less_equal(const V& a, const V& b) {
  return a.v <= b.v;
}
template <class V>
FASTVAE_INLINE bool equal(const V& a, const V& b) {
  return a.v == b.v;
}
template <class V>
FASTVAE_INLINE bool between(const V& low, const V& x, const V& high) {
  return low.v <= x.v && x.v <= high.v;
}
template <class V>
FASTVAE_INLINE bool any(bool m) {
  return m;
}
template <class V>
FASTVAE_INLINE V select(bool m, const V& yes, const V& no) {
  return m ? yes : no;
}
FASTVAE_INLINE bool sign_bit(const F32& x) { return __float_as_int(x.v) < 0; }
FASTVAE_INLINE bool sign_bit(const F64& x) { return __double_as_longlong(x.v) < 0; }
// a ≥ 0 with the sign of b.
template <class T>
FASTVAE_INLINE Lane<T> with_sign(const Lane<T>& a, const Lane<T>& b) {
  return Lane<T>(::copysign(a.v, b.v));
}

// These keep NaN.
template <class V>
FASTVAE_INLINE V max(const V& a, const V& b) {
  return V(a.v > b.v || a.v != a.v ? a.v : b.v);
}
template <class V>
FASTVAE_INLINE V clamp_min(const V& x, const V& low) {
  return V(x.v < low.v ? low.v : x.v);
}
template <class V>
FASTVAE_INLINE V clamp(const V& x, const V& low, const V& high) {
  return V(x.v < low.v ? low.v : x.v > high.v ? high.v : x.v);
}

// a b + c, a b − c, −a b + c in one rounding.
template <class T>
FASTVAE_INLINE Lane<T> fmadd(const Lane<T>& a, const Lane<T>& b, const Lane<T>& c) {
  return Lane<T>(::fma(a.v, b.v, c.v));
}
template <class T>
FASTVAE_INLINE Lane<T> fmsub(const Lane<T>& a, const Lane<T>& b, const Lane<T>& c) {
  return Lane<T>(::fma(a.v, b.v, -c.v));
}
template <class T>
FASTVAE_INLINE Lane<T> fnmadd(const Lane<T>& a, const Lane<T>& b, const Lane<T>& c) {
  return Lane<T>(::fma(-a.v, b.v, c.v));
}

// table[i], i a whole number in [0, 16).
template <class V>
FASTVAE_INLINE V lookup16(const double (&table)[16], const V& i) {
  return num<V>(table[static_cast<int>(i.v)]);
}

template <int places>
FASTVAE_INLINE I32 shift_left(const I32& x) {
  return x << I32(places);
}
// Zeros come in from the left.
template <int places>
FASTVAE_INLINE I32 shift_right_unsigned(const I32& x) {
  return I32(static_cast<int32_t>(static_cast<uint32_t>(x.v) >> places));
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
