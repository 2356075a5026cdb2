// Work over threads, in shares that whoever is done early helps with.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fastvae {
inline namespace CPU_CAPABILITY {

// Elements below which a second thread costs more than it brings (about 5 µs to wake one).
constexpr int64_t grain_elements = 8192;
// Elements that are taken from a share at once.
constexpr int64_t block_elements = 4096;

// The units [0, end) in as many shares as there are threads. A thread takes blocks from its own
// share, front to back, so that it meets the same memory in every call, and then from the others':
// one that wakes late, or whose core is busy, holds nobody up. What is computed for a unit must not
// depend on who does it, nor when.
class Shares {
 public:
  Shares(int64_t units, int64_t count, int64_t block) : block_(block), shares_(count) {
    for (int64_t s = 0; s < count; ++s) {
      shares_[s].next = units * s / count;
      shares_[s].end = units * (s + 1) / count;
    }
  }

  // Calls body(begin, end) for block after block until none is left.
  template <class Body>
  void work(int64_t own, Body&& body) {
    const auto count = static_cast<int64_t>(shares_.size());
    for (int64_t s = 0; s < count; ++s) {
      Share& share = shares_[(own + s) % count];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t begin = share.next.fetch_add(block_, std::memory_order_relaxed);
        if (begin < share.end) body(begin, std::min(begin + block_, share.end));
      }
    }
  }

 private:
  struct alignas(64) Share {  // each on a cache line of its own
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t block_;
  std::vector<Share> shares_;
};

// Calls worker(ranges) on each thread that takes part; ranges(body) calls body(begin, end) for the
// units that fall to it. Between them they cover [0, units).
template <class Worker>
inline void parallel_units(int64_t units, int64_t elements_per_unit, Worker&& worker) {
  const auto units_of = [&](int64_t elements) { return elements / (elements_per_unit + 1) + 1; };
  const int64_t grain = units_of(grain_elements);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region()) {
    worker([&](auto&& body) { body(int64_t{0}, units); });
    return;
  }
  Shares shares(units, threads, units_of(block_elements));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    worker([&](auto&& body) { shares.work(begin, body); });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fastvae
