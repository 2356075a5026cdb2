// What translated PTX is written in: threads that run one after the other to where they meet, and
// memory in which every access is checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

// Whether [address, address + size) lies in one piece of memory that is allocated now.
extern "C" bool emulator_is_live(uint64_t address, size_t size);
extern "C" void emulator_add(const void* p, size_t size);
extern "C" void emulator_add_kernel(const char* name, void (*launch)(void**, unsigned, unsigned));
extern "C" int emulator_error();       // of approximate instructions, in units in the last place
extern "C" bool emulator_backwards();  // threads and blocks run in reverse order

namespace {

enum Waits { running, for_warp, for_block, for_nothing };

struct Thread {
  unsigned id;
  int at;  // the meeting at which it stopped last
  Waits waits;
  uint32_t offer;
};

struct Warp {
  uint32_t offered[32];
  uint32_t ballot() const {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (offered[lane] != 0 ? 1u : 0u) << lane;
    return all;
  }
  uint32_t sum() const {
    uint32_t all = 0;
    for (const uint32_t one : offered) all += one;
    return all;
  }
};

struct Block {
  unsigned index, blocks, threads;
  const char* kernel;
  std::vector<uint8_t> memory;

  [[noreturn]] void fail(const char* what, uint64_t address, size_t size, int line) const {
    std::fprintf(stderr, "%s of %zu bytes at %#lx, statement %d of %s, block %u\n", what, size,
                 static_cast<unsigned long>(address), line, kernel, index);
    std::abort();
  }
  char* global(uint64_t address, size_t size, int line) const {
    if (address % size != 0) fail("misaligned access", address, size, line);
    if (!emulator_is_live(address, size)) fail("access outside of any tensor", address, size, line);
    return reinterpret_cast<char*>(address);
  }
  char* shared(uint64_t address, size_t size, int line) {
    address &= 0xffffffffu;
    if (address % size != 0) fail("misaligned shared access", address, size, line);
    if (address + size > memory.size())
      fail("access outside of shared memory", address, size, line);
    return reinterpret_cast<char*>(memory.data() + address);
  }
};

// What is there from the start: a table, a kernel.
struct Known {
  Known(const void* p, size_t size) { emulator_add(p, size); }
};
struct Launcher {
  Launcher(const char* name, void (*launch)(void**, unsigned, unsigned)) {
    emulator_add_kernel(name, launch);
  }
};

inline char* at(uint64_t address) { return reinterpret_cast<char*>(address); }
template <class V>
inline V read(const char* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
inline void write(char* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline float as_float(uint64_t bits) {
  const auto low = static_cast<uint32_t>(bits);
  float f;
  std::memcpy(&f, &low, 4);
  return f;
}
inline double as_double(uint64_t bits) {
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
}
inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline uint64_t bits_of(double d) {
  uint64_t u;
  std::memcpy(&u, &d, 8);
  return u;
}

inline float from_bf16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }
inline uint16_t to_bf16(float f) {
  if (f != f) return 0x7fff;
  const uint32_t u = bits_of(f);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
inline uint16_t to_f16(float f) {
  if (f != f) return 0x7fff;
  const auto x = static_cast<_Float16>(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
}

// Out of range goes to the limit, NaN to 0.
template <class I, class F>
inline I to_whole(F f) {
  if (f != f) return 0;
  if (f <= static_cast<F>(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  if (f >= static_cast<F>(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
  return static_cast<I>(f);
}

template <class V>
inline V ptx_min(V a, V b) {
  if (a != a) return b;
  return b < a ? b : a;
}
template <class V>
inline V ptx_max(V a, V b) {
  if (a != a) return b;
  return a < b ? b : a;
}
// The other kind gives NaN where one of the two is.
template <class V>
inline V ptx_min_nan(V a, V b) {
  return a != a || b != b ? std::numeric_limits<V>::quiet_NaN() : ptx_min(a, b);
}
template <class V>
inline V ptx_max_nan(V a, V b) {
  return a != a || b != b ? std::numeric_limits<V>::quiet_NaN() : ptx_max(a, b);
}
// PTX has the sign first.
template <class V>
inline V ptx_copysign(V sign, V size) {
  return std::copysign(size, sign);
}
template <class V>
inline V ptx_div(V a, V b) {
  if constexpr (std::is_integral_v<V>)
    if (b == 0) return static_cast<V>(-1);
  return a / b;
}
template <class V>
inline V ptx_rem(V a, V b) {
  return b == 0 ? a : a % b;
}
template <class V>
inline V ptx_fma(V a, V b, V c) {
  return std::fma(a, b, c);
}
template <class V>
inline V ptx_sqrt(V a) {
  return std::sqrt(a);
}
inline float flush(float a) {
  return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.f, a) : a;
}
// Of float32, as far off as is asked for; infinities, 0 and what is next to them are what they are.
inline float approximate(float a) {
  const float size = std::abs(a);
  return size > 1e-37f && size < 3e38f ? as_float(bits_of(a) + emulator_error()) : a;
}
inline float ptx_rsqrt_approx(float a) {
  return approximate(static_cast<float>(1 / std::sqrt(double{a})));
}
inline float ptx_div_full(float a, float b) { return approximate(a / b); }
template <class V>
inline V ptx_rcp(V a) {
  return V(1) / a;
}
// Of float64: the upper half of the bits.
inline double ptx_rcp_approx(double a) { return as_double(bits_of(1 / a) & 0xffffffff00000000ull); }
template <class V>
inline V ptx_abs(V a) {
  return std::abs(a);
}
template <class V>
inline V ptx_neg(V a) {
  return static_cast<V>(-a);
}
template <class V>
inline V shift_left(V a, uint32_t n) {
  return n >= 8 * sizeof(V) ? V(0) : static_cast<V>(a << n);
}
template <class V>
inline V shift_right(V a, uint32_t n) {
  const uint32_t most = 8 * sizeof(V) - 1;
  if (n > most) return std::is_signed_v<V> ? static_cast<V>(a >> most) : V(0);
  return static_cast<V>(a >> n);
}
// Bits beyond the number's are 0, or its sign; the field's own sign is its last bit.
template <class V>
inline V ptx_bfe(V a, V first, V count) {
  static_assert(sizeof(V) == 4);
  using Wide = std::conditional_t<std::is_signed_v<V>, int64_t, uint64_t>;
  const int at = std::min<int>(first & 255, 63), drop = 64 - std::min<int>(count & 255, 32);
  if (drop == 64) return 0;
  const auto field = static_cast<uint64_t>(static_cast<Wide>(a) >> at) << drop;
  return static_cast<V>(static_cast<Wide>(field) >> drop);
}
// Four bytes of the eight, each named by a digit; 8 added: its sign alone.
inline uint32_t ptx_prmt(uint32_t low, uint32_t high, uint32_t digits) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t all = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = digits >> (4 * i) & 15, byte = bytes >> (8 * (digit & 7)) & 255;
    all |= (digit < 8 ? byte : byte >> 7 != 0 ? 255u : 0u) << (8 * i);
  }
  return all;
}
template <class V>
inline V insert_bits(V a, V into, uint32_t first, uint32_t count) {
  const V ones = count >= 8 * sizeof(V) ? ~V(0) : (V(1) << count) - 1,
          mask = shift_left(ones, first);
  return (into & ~mask) | (shift_left(a, first) & mask);
}

// Runs every block: each warp until all its threads wait for the block or are done, then the block.
template <class T>
void run_grid(void (*run)(T*, Warp*, Block*, void**), void** arguments, const char* kernel,
              unsigned blocks, unsigned threads, size_t shared) {
  std::vector<T> all(threads);
  std::vector<Warp> warps(threads / 32);
  const bool backwards = emulator_backwards();
  for (unsigned i = 0; i < blocks; ++i) {
    Block block{backwards ? blocks - 1 - i : i, blocks, threads, kernel,
                std::vector<uint8_t>(shared, 0x7f)};
    std::memset(static_cast<void*>(all.data()), 0xaa, sizeof(T) * threads);
    for (unsigned id = 0; id < threads; ++id) {
      all[id].id = id;
      all[id].at = 0;
      all[id].waits = running;
    }
    for (bool more = true; more;) {
      for (unsigned v = 0; v < warps.size(); ++v) {
        const unsigned w = backwards ? static_cast<unsigned>(warps.size()) - 1 - v : v;
        T* lanes = all.data() + 32 * w;
        for (;;) {
          for (unsigned k = 0; k < 32; ++k) {
            T& t = lanes[backwards ? 31 - k : k];
            if (t.waits == running) run(&t, &warps[w], &block, arguments);
          }
          const auto waiting =
              std::count_if(lanes, lanes + 32, [](const T& t) { return t.waits == for_warp; });
          if (waiting == 0) break;
          for (int k = 0; k < 32; ++k) {
            if (lanes[k].waits != for_warp || lanes[k].at != lanes[0].at)
              block.fail("a warp parted where its threads meet", 0, 0, lanes[k].at);
            warps[w].offered[k] = lanes[k].offer;
            lanes[k].waits = running;
          }
        }
      }
      more = false;
      for (const T& t : all) more |= t.waits == for_block;
      for (T& t : all) {
        if (!more) break;
        if (t.waits != for_block || t.at != all[0].at)
          block.fail("a block parted where its threads meet", 0, 0, t.at);
        t.waits = running;
      }
    }
  }
}

}  // namespace
