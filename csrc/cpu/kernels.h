// The CPU kernels' interface: raw pointers and sizes, no torch types, so that each instruction
// set's object looks the same to the operators.
#pragma once

#include <cstdint>

#include "../formulas/formula.h"
#include "../formulas/list.h"

namespace fastvae {

enum class DType : uint8_t { f64, f32, bf16, f16, u8, i8, i16, i32, i64 };

// An input seen as a matrix [rows, cols], or [rows, planes, cols]. Row r is stored row r mod
// `period`; a stride of 0 repeats a row, a column stride of 0 one element along it.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0;  // in elements
  int64_t col_stride = 1;
  int64_t period = 1;
  int64_t planes = 1;
  int64_t plane_stride = 0;
};

// A dense output [rows, cols], or one with planes, which may come before or behind the columns.
// `data` null: not wanted.
struct Output {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool planes_last = false;
};

// What fits the L1 cache, in elements.
constexpr int64_t tile = 1024;
// Long rows are cut at multiples of `row_chunk` columns, so that two cores share even one row; the
// cut does not depend on the number of threads, and so neither do the sums.
constexpr int64_t row_chunk = 16 * tile;
FASTVAE_INLINE int64_t chunks(int64_t cols) {
  return cols <= row_chunk ? 1 : (cols + row_chunk - 1) / row_chunk;
}

// Rows of at most this many elements are taken several at once: what a row costs by itself, a sum
// across lanes and the pointers, is more than their elements do.
constexpr int64_t short_row = 48;

// Sites that are computed together, all their planes in the L2 cache beside their gradients: of 256
// planes far from one another half as many took 1.35 times as long.
constexpr int64_t site_elements = 32 * tile, site_step = 16;
// From so many planes on that lie end to end they are the lanes of a vector.
constexpr int64_t many_planes = 128;
// Few sites are shared out too.
constexpr int64_t fewest_elements = 4 * tile;
FASTVAE_INLINE int64_t sites_at_once(int64_t planes, bool across_planes, int64_t all_sites) {
  const int64_t share = all_sites * planes / 8, step = across_planes ? 1 : site_step;
  const int64_t elements = share < fewest_elements ? fewest_elements
                           : share > site_elements ? site_elements
                                                   : share;
  const int64_t sites = elements / planes / step * step;
  return sites < step ? step : sites > tile ? tile : sites;
}

// The work in units that any thread may do: as many short rows as fit a tile; a row's chunk; or
// where gradients are summed over the rows, a tile's columns of at least 32 rows and at most 8
// such blocks. Of sites (`at_once`, else 0) a tile, of one row or of several whole ones. A row has
// `per_row` partial sums, a column `blocks`.
struct Units {
  bool together;
  int64_t rows, cols, per_row, blocks, count;
  FASTVAE_INLINE Units(int64_t all_rows, int64_t all_cols, bool by_column, int64_t at_once = 0) {
    together = all_cols > 0 && all_cols <= (at_once ? at_once : short_row);
    rows = together    ? (at_once ? at_once : tile) / all_cols
           : by_column ? at_least(32, (all_rows + 7) / 8)
                       : 1;
    cols = together ? all_cols : at_once ? at_once : by_column ? tile : row_chunk;
    per_row = at_least(1, (all_cols + cols - 1) / at_least(1, cols));
    blocks = (all_rows + rows - 1) / rows;
    count = blocks * per_row;
  }

 private:
  static FASTVAE_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
};

struct RowwiseArgs {
  int formula;  // its place in Formulas
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
  // Of gradients that are summed over the rows: doubles, [Units.blocks, cols]; null: not wanted.
  // `by_column`: there are such.
  double* columns[max_inputs];
  bool by_column;
  int64_t sites;       // `sites_at_once` of a formula with planes; 0 of one without
  bool across_planes;  // lanes are planes, which lie end to end in inputs and outputs
  unsigned* outside;   // bit j is set where input j leaves its domain
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
