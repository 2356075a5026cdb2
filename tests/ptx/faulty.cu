// Kernels that do what tests/ptx must find: one for each fault.
#include <cstdio>
#include <cstdlib>

constexpr int threads = 64;

__global__ void kernel(float* data, int n) {
  __shared__ float shared[threads];
  const int i = static_cast<int>(threadIdx.x);
#if defined(FAULT_outside)
  data[i + 1] = 1;
#elif defined(FAULT_misaligned)
  *reinterpret_cast<float2*>(data + 1 + i % 2) = make_float2(1, 1);
#elif defined(FAULT_parted)
  if (i < n / 2 + 3) data[i] = __shfl_down_sync(0xffffffffu, data[i], 1);
#else
  shared[i] = data[i];
#if !defined(FAULT_unsynchronized)
  __syncthreads();
#endif
  data[i] = shared[threads - 1 - i];
#endif
}

int main() {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, threads * sizeof(float)) != 0) return 2;
  auto* data = static_cast<float*>(memory);
  for (int i = 0; i < threads; ++i) data[i] = static_cast<float>(i);
  kernel<<<1, threads>>>(data, threads);
  for (int i = 0; i < threads; ++i)
    if (data[i] != static_cast<float>(threads - 1 - i)) {
      std::fprintf(stderr, "wrong\n");
      return 1;
    }
  return 0;
}
