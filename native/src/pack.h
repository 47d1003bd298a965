// Tensors as files hold them, and the packed tiles that kernels read.
#pragma once

#include "common.h"
#include "kernels/kernels.h"

namespace pp {

// Storage types by their GGUF number. Returns false for a type that is not read.
struct TypeInfo {
  const char* name;
  int block_weights;
  int block_bytes;
  int pack;
};
const TypeInfo* type_info(int type);
bool is_float_type(int type);

size_t tile_bytes(int pack, int cols);
// Columns must be a multiple of this.
int pack_columns(int pack);
// Float of 4 bits and more per weight as stored, for reports.
double pack_bits_per_weight(int pack);

// A matrix in tiles. `paired` interleaves two matrices of the same shape by sixteen rows (gate and up), so
// that one tile holds what one output needs; `rows` then counts the rows of one of them.
struct Matrix {
  int pack = -1;
  int rows = 0;
  int cols = 0;
  bool paired = false;
  Pages tiles;

  bool allocate(int pack_, int rows_, int cols_, bool paired_);
  bool empty() const { return pack < 0; }
  int num_tiles() const { return (rows + width() - 1) / width(); }
  int width() const { return paired ? 16 : 32; }
  size_t bytes_of_tile() const { return tile_bytes(pack, cols); }
  const uint8_t* tile(int index) const { return tiles.data() + size_t(index) * bytes_of_tile(); }
};

// Write a row of `type` into row r (0..31) of a tile of the pack that `store_type` means. `scratch` holds
// at least cols * 8 bytes.
void pack_row(int type, int store_type, const uint8_t* row, int cols, uint8_t* tile, int r, uint8_t* scratch);
// Can rows of `type` be stored as `store_type`?
bool can_store(int type, int store_type);

// Row `row` of an unpaired matrix as float32.
void unpack_row(const Matrix& matrix, int row, float* out);

}  // namespace pp
