// The CPU kernels' interface: raw pointers and sizes, no torch types, so that each instruction
// set's object looks the same to the operators.
#pragma once

#include <cstdint>

#include "../formulas/list.h"

namespace fastvae {

enum class DType : uint8_t { f64, f32, bf16, f16, u8 };

// An input seen as a matrix [rows, cols]. Row r is stored row r mod `period`; a stride of 0 repeats
// a row, a column stride of 0 one element along it.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0;  // in elements
  int64_t col_stride = 1;
  int64_t period = 1;
};

// A dense output [rows, cols]. `data` null: not wanted.
struct Output {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// Long rows are cut at multiples of `row_chunk` columns, so that two cores share even one row; the
// cut does not depend on the number of threads, and so neither do the sums.
constexpr int64_t row_chunk = 16384;
inline int64_t chunks(int64_t cols) {
  return cols <= row_chunk ? 1 : (cols + row_chunk - 1) / row_chunk;
}

// Rows of at most this many elements are taken several at once: what a row costs by itself, a sum
// across lanes and the pointers, is more than their elements do.
constexpr int64_t short_row = 48;

struct RowwiseArgs {
  Family family;
  int64_t rows, cols;
  bool use_double;         // compute in float64, else in float32
  Operand in[max_inputs];  // in the formula's order
  Operand mask;            // u8, 0 leaves the element out; data null: no mask
  double options[max_options];
  double scale;             // multiplies every gradient …
  Operand weight;           // … and so does the row's weight (one column); data null: 1
  bool want_grad;           // any gradient at all
  Output grad[max_inputs];  // the dense gradients, [rows, cols]
  // The value's sum along each row, then those of gradients that are summed along it; null: not
  // wanted. [rows] in the compute type where a row is one chunk, else doubles, [rows * chunks].
  void* sum[1 + max_inputs];
  unsigned* outside;  // bit j is set where input j leaves its domain
};

// Which normals: row b is sample `sample_index[b]` of the stream, else `sample_offset` + b.
struct Stream {
  uint64_t seed;
  int64_t num_samples, sample_offset;
  const int64_t* sample_index;  // [batch]; null: none
};

struct SampleArgs {
  int64_t batch, cols;
  bool use_double;
  Stream stream;
  Operand mu, logvar;  // [batch, cols]
  Output z;            // [num_samples, batch, cols]
  double* kl;          // [batch * chunks(cols)] partial sums; null: not wanted
};

struct SampleBackwardArgs {
  int64_t batch, cols;
  bool use_double;
  Stream stream;
  Operand mu, logvar;           // [batch, cols]
  Operand grad_z;               // [num_samples, batch, cols]; data null: zero
  Operand grad_kl;              // [batch, 1], repeated; data null: zero
  Output grad_mu, grad_logvar;  // [batch, cols]
};

struct Kernels {
  const char* isa;
  void (*rowwise)(const RowwiseArgs&);
  void (*sample)(const SampleArgs&);
  void (*sample_backward)(const SampleBackwardArgs&);
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);
};

// The table of the best instruction set that this machine has (ATEN_CPU_CAPABILITY lowers it).
const Kernels& kernels();
// The instruction sets that were compiled in, best last, comma-separated.
const char* compiled_isas();

}  // namespace fastvae
