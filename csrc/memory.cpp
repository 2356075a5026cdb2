#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastvae {
namespace {

constexpr size_t least = size_t{1} << 18;  // below, malloc does as well
constexpr size_t most_blocks = 4;
constexpr uint64_t most_idle = 64;  // a block that this many others came back after is freed

struct Block {
  explicit Block(size_t n) : bytes(n), data(c10::alloc_cpu(n)) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // A fault per 2 MiB where the system allows it; where not, nothing is lost.
    constexpr uintptr_t huge = uintptr_t{1} << 21;
    const auto begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
    const auto end = (reinterpret_cast<uintptr_t>(data) + n) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  }
  ~Block() { c10::free_cpu(data); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const size_t bytes;
  void* const data;
  uint64_t returned = 0;  // the cache's clock when it came back
};

class Cache final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive every static object.
  static Cache& instance() {
    static auto* cache = new Cache;
    return *cache;
  }

  c10::DataPtr allocate(size_t n) override {
    std::unique_ptr<Block> block = take(n);
    if (!block) block = std::make_unique<Block>(n);
    c10::profiledCPUMemoryReporter().New(block->data, n);
    void* data = block->data;
    return {data, block.release(), give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

  size_t clear() {
    std::vector<std::unique_ptr<Block>> freed;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      freed.swap(kept_);
    }
    size_t bytes = 0;
    for (const auto& block : freed) bytes += block->bytes;
    return bytes;
  }

 private:
  // The lock is only ever tried: in a forked child its owner may not exist.
  std::unique_ptr<Block> take(size_t n) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto best = kept_.end();
    for (auto b = kept_.begin(); b != kept_.end(); ++b)
      if ((*b)->bytes >= n && (*b)->bytes / 2 <= n &&
          (best == kept_.end() || (*b)->bytes < (*best)->bytes))
        best = b;
    if (best == kept_.end()) return nullptr;
    std::unique_ptr<Block> block = std::move(*best);
    kept_.erase(best);
    return block;
  }

  static void give_back(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    instance().keep(std::move(block));
  }

  void keep(std::unique_ptr<Block> block) {
    std::vector<std::unique_ptr<Block>> freed;  // outside the lock
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || !enabled_) return;
    block->returned = ++clock_;
    kept_.push_back(std::move(block));
    // The oldest come first.
    while (kept_.size() > most_blocks || clock_ - kept_.front()->returned > most_idle) {
      freed.push_back(std::move(kept_.front()));
      kept_.erase(kept_.begin());
    }
  }

  static bool enabled_by_environment() {
    const char* value = std::getenv("FASTVAE_CACHE");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }

  const bool enabled_ = enabled_by_environment();
  std::mutex mutex_;
  uint64_t clock_ = 0;
  std::vector<std::unique_ptr<Block>> kept_;
};

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  if (!device.is_cpu()) return at::empty(sizes, at::TensorOptions(device).dtype(type));
  const bool large = c10::multiply_integers(sizes) * c10::elementSize(type) >= least;
  c10::Allocator* memory = large ? &Cache::instance() : c10::GetCPUAllocator();
  const at::Tensor out = at::detail::empty_generic(
      sizes, memory, c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
  const auto& context = at::globalContext();  // as at::empty does
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory() &&
      c10::isFloatingType(type))
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  return out;
}

size_t empty_cache() { return Cache::instance().clear(); }

}  // namespace fastvae
