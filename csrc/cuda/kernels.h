// The CUDA kernels' interface: raw pointers, sizes and a stream, no torch types, so that nvcc sees
// none of torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/kernels.h"

namespace fastvae::cuda {

constexpr int block_threads = 256;
// Rows are cut until there are so many blocks: a large device is full a few times over.
constexpr int64_t enough_blocks = 1024;
// Fewer where each has sums of its own to store: two on each of 132 multiprocessors.
constexpr int64_t enough_column_blocks = 264;
constexpr int64_t most_rows_at_once = 128;  // that a float32 adds up one after the other

// An operand as a thread reads it. `vectors`: 16 bytes, or a thread's few elements, are aligned.
struct Source {
  const void* data = nullptr;
  int64_t row_stride = 0, col_stride = 1, plane_stride = 0, period = 1, planes = 1;
  DType dtype = DType::f32;
  bool vectors = false;
};
// A gradient [rows, cols], dense, or of sites with its planes before or behind the columns.
struct Target {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool vectors = false, planes_last = false;
};

// How rows are dealt out: `lanes` threads to each of `splits` chunks of a row.
struct Split {
  int lanes = block_threads;
  int64_t splits = 1, chunk = 0;
};

struct RowwiseArgs {
  int formula;  // its place in Formulas
  int64_t rows, cols;
  bool use_double, want_grad;
  // Of sites: the threads of each, 1, a warp or a block; several where planes lie end to end.
  int site_threads;
  Split split;
  Source in[max_inputs], mask, weight;
  double options[max_options];
  double scale;
  Target grad[max_inputs];
  // [rows, splits] in the compute type: the value's sums, then those of gradients summed along the
  // row; null: not wanted.
  void* sum[1 + max_inputs];
  // Of one input whose gradient is summed over the rows, [rows / rows_at_once, cols] in the compute
  // type: a block then has a chunk of `rows_at_once` rows.
  int column = -1;
  void* over_rows;
  int64_t rows_at_once;
};

struct StreamArgs {
  const int64_t* seed;  // on the device
  int64_t num_samples, sample_offset;
  const int64_t* sample_index;  // null: none
};

// `counters`: of how many the normals are drawn in the order of the stream; 0: row by row.
struct SampleArgs {
  int64_t batch, cols, counters;
  bool use_double;
  Split split;
  StreamArgs stream;
  Source mu, logvar;
  Target z;
  void* kl;  // [batch, splits] in the compute type; null: not wanted
};

struct SampleBackwardArgs {
  int64_t batch, cols, counters;
  bool use_double;
  Split split;
  StreamArgs stream;
  Source mu, logvar, grad_z, grad_kl;  // data null: zero
  Target grad_mu, grad_logvar;
};

struct ReduceArgs {
  int64_t batch, num_samples;
  bool each;       // the results of each sample, else …
  int64_t blocks;  // … the sums of each block; of the loss, if it has memory
  double beta, scale;
  Source log_likelihood, kl, weight;  // of one column
  Target loss, log_likelihood_out, kl_out;
};

struct ScaleArgs {
  int64_t rows, cols;
  Target grad;
  Source factor;  // of one column
};

// How `rows` of so many columns are dealt out, `per_thread` elements at a time.
Split deal(int64_t rows, int64_t cols, int64_t per_thread);
// The same where blocks keep columns; `at_once` becomes the rows of a block.
Split deal_columns(int64_t rows, int64_t cols, int64_t per_thread, int64_t& at_once);
// Elements that a thread takes at a time, in either compute type.
constexpr int per_thread(bool use_double) { return use_double ? 2 : 4; }

// Whether the current device has an architecture that they were compiled for.
bool run_here();

void rowwise(const RowwiseArgs& args, cudaStream_t stream);
void sample(const SampleArgs& args, cudaStream_t stream);
void sample_backward(const SampleBackwardArgs& args, cudaStream_t stream);
// Blocks that a sum over the batch is worth, a few samples a thread.
constexpr int64_t reduce_blocks(int64_t batch) {
  constexpr int64_t each = 4 * block_threads, most = block_threads;
  return batch <= 2 * each ? 1 : batch >= each * most ? most : (batch + each - 1) / each;
}

void elbo_reduce(const ReduceArgs& args, cudaStream_t stream);
void scale_rows(const ScaleArgs& args, cudaStream_t stream);
// out[i] = Σ of the parts of i, in order: [count, parts], or [parts, count].
void sum_parts(const void* partial, int64_t count, int64_t parts, bool parts_first, bool use_double,
               void* out, cudaStream_t stream);

}  // namespace fastvae::cuda
