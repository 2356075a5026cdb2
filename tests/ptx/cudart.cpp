// A CUDA runtime without a device: launches go to translated kernels, device memory is what
// posix_memalign gives (torch's CPU tensors). Loaded before torch, which then allocates here.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

using Launch = void (*)(void** arguments, unsigned blocks, unsigned threads);

// Never destroyed: memory is given back until the very end.
struct State {
  std::mutex lock;
  std::map<uint64_t, size_t> live;  // where it begins, and how many bytes were asked for
  std::unordered_map<const void*, std::string> kernels;  // by what the host calls
  std::unordered_map<std::string, Launch> launchers;
  unsigned launches = 0;
};
State& state() {
  static auto* s = new State;
  return *s;
}
thread_local unsigned grid, threads;
thread_local bool inside = false;  // the map allocates too

}  // namespace

extern "C" {

int posix_memalign(void** out, size_t align, size_t size) {
  static const auto real =
      reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  const int error = real(out, align, size);
  if (error == 0 && !inside) {
    inside = true;
    const std::lock_guard<std::mutex> lock(state().lock);
    state().live[reinterpret_cast<uint64_t>(*out)] = size;
    inside = false;
  }
  return error;
}

void free(void* p) {
  static const auto real = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
  if (p != nullptr && reinterpret_cast<uint64_t>(p) % 64 == 0 && !inside) {
    inside = true;
    const std::lock_guard<std::mutex> lock(state().lock);
    state().live.erase(reinterpret_cast<uint64_t>(p));
    inside = false;
  }
  real(p);
}

void emulator_add(const void* p, size_t size) {
  const std::lock_guard<std::mutex> lock(state().lock);
  state().live[reinterpret_cast<uint64_t>(p)] = size;
}

void emulator_remove(const void* p) {
  const std::lock_guard<std::mutex> lock(state().lock);
  state().live.erase(reinterpret_cast<uint64_t>(p));
}

void emulator_add_kernel(const char* name, Launch launch) { state().launchers[name] = launch; }

bool emulator_is_live(uint64_t address, size_t size) {
  static thread_local uint64_t begin = 1, end = 0;
  static thread_local unsigned launch = 0;
  if (launch == state().launches && address >= begin && address + size <= end) return true;
  const std::lock_guard<std::mutex> lock(state().lock);
  auto after = state().live.upper_bound(address);
  if (after == state().live.begin()) return false;
  --after;
  begin = after->first;
  end = begin + after->second;
  launch = state().launches;
  return address + size <= end;
}

bool emulator_backwards() {
  static const bool asked = std::getenv("EMULATOR_BACKWARDS") != nullptr;
  return asked;
}

int emulator_error() {
  static const char* asked = std::getenv("EMULATOR_ERROR");
  static const int error = asked == nullptr ? 0 : std::atoi(asked);
  return error;
}

void emulator_launch(const char* kernel, void** arguments, unsigned blocks, unsigned threads) {
  ++state().launches;
  state().launchers.at(kernel)(arguments, blocks, threads);
}

unsigned emulator_launches() { return state().launches; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaInitModule(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  state().kernels[host] = name;
}
struct Dim3 {
  unsigned x, y, z;
};
unsigned __cudaPushCallConfiguration(Dim3 g, Dim3 b, size_t, void*) {
  grid = g.x;
  threads = b.x;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* g, Dim3* b, size_t* bytes, void** stream) {
  *g = {grid, 1, 1};
  *b = {threads, 1, 1};
  *bytes = 0;
  *stream = nullptr;
  return 0;
}
int cudaLaunchKernel(const void* host, Dim3 g, Dim3 b, void** arguments, size_t, void*) {
  ++state().launches;
  static const bool idle = std::getenv("EMULATOR_IDLE") != nullptr;  // to time the host alone
  if (idle) return 0;
  state().launchers.at(state().kernels.at(host))(arguments, g.x, b.x);
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaFuncGetAttributes(void*, const void*) { return 0; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error"; }
int __cudaLaunchKernel(const void* host, Dim3 g, Dim3 b, void** a, size_t n, void* s) {
  return cudaLaunchKernel(host, g, b, a, n, s);
}
}
