// The table of kernels that each instruction set fills, and the memory layouts they share.
//
// Every kernel computes a given output with the same floating-point operations in the same order on every
// instruction set and for every number of tokens: lanes are rows of a matrix or positions of a sequence,
// never parts of one sum. So results are bit for bit equal across machines, chunkings and batches.
//
// Only plain types here: kernel files are compiled with flags that the rest of the program must not see,
// so they share no inline function with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pp {

// A packed matrix is a sequence of tiles of 32 rows; a tile holds, for one stretch of columns after the
// other, the weights of its 32 rows with their scales beside them, so that it is read once from start to
// end. A stretch is 32 columns (256 for the K formats, 1 for floats).
constexpr int kTileRows = 32;
constexpr int kGroup = 32;

// Weights of a stretch come in 64-byte pieces: 4 consecutive columns of 16 rows, row after row. A nibble
// piece holds columns c..c+3 in the low and c+4..c+7 in the high halves. Rows 0-15 come before 16-31.
enum Pack : int {
  kPackF32,   // [column][32 rows]
  kPackF16,
  kPackBF16,
  kPackQ8,    // 1024 bytes of int8, 32 half scales
  kPackQ4S,   // 512 bytes of nibbles, 32 half scales; value = d (q - 8)
  kPackQ4A,   // 512 bytes of nibbles, 32 half scales, 32 half offsets; value = d q + m
  kPackQ4K,   // 32 half d, 32 half dmin, then 8 of: nibbles, 32 byte scales, 32 byte minima
  kPackQ5K,   // as Q4K with 128 bytes of fifth bits after the nibbles: bit j is quad j's
  kPackQ6K,   // 32 half d, then 8 of: nibbles, 256 bytes of bit pairs, 2 x 32 int8 scales; d s (q - 32)
  kNumPacks
};

// Activations of up to 6 tokens (16 in a wide panel) form a panel: for every group of 32 columns a record of int8 values
// [place][32], then per place: scale, scale times sum, 8 times the sum, sums of both halves. Records of wide panels
// have room for 16 places, however many there are: all are alike for kernels that multiply whole tiles. Of places
// that are left, only the scales count: they are 0.
// As float32 a panel is [column][token], always of narrow panels.
//
// With 16 bits a token takes two places: its int8 values, and what their rounding left over as int8 values
// with a scale of their own (x = d1 q1 + d2 q2, within 2^-16 of the group's largest). The products of both
// are added at the end, so such a panel holds half as many tokens and the inner loops stay the same.
constexpr int kPanelPlaces = 6;
constexpr int kWidePlaces = 16;  // for kernels that multiply whole tiles, see Kernels::wide_from
constexpr int kRecordBytes = 32 + 4 * 5;  // per place
constexpr int kWideRecordBytes = kWidePlaces * kRecordBytes;

static inline int num_panels(int tokens, int places, int panel_places) {
  const int tokens_of_panel = panel_places / places;
  return (tokens + tokens_of_panel - 1) / tokens_of_panel;
}
static inline int panel_start(int panel, int tokens, int panels) { return int(int64_t(panel) * tokens / panels); }
// Tokens that the records of a panel of `count` tokens have room for.
static inline int panel_room(int count, int places, int panel_places) { return panel_places == kWidePlaces ? kWidePlaces / places : count; }
// Where a panel of 8-bit numbers lies whose first token is `first`, in bytes.
static inline size_t panel_offset(int panel, int first, int places, int panel_places, int cols) {
  const size_t record_places = panel_places == kWidePlaces ? size_t(panel) * kWidePlaces : size_t(first) * size_t(places);
  return record_places * size_t(cols / kGroup) * kRecordBytes;
}

enum Epilogue : int { kStore, kAdd, kSiluMul };

struct LinearCall {
  const uint8_t* tiles;
  size_t tile_bytes;
  int pack;
  int cols;
  int rows;  // of the output; for kSiluMul a tile gives 16, its rows 0-15 being gates and 16-31 values
  int tile_begin, tile_end;
  const uint8_t* panels;
  int num_tokens;
  int places;  // of a token in a panel: 1, or 2 for activations of 16 bits
  int panel_places;  // kPanelPlaces or kWidePlaces
  int panel_begin, panel_end;
  bool float_panels;  // one number per token, whatever `places`
  float* out;
  size_t out_stride;
  int epilogue;
};

// Keys and values of one head for kChunk consecutive positions. Channels are padded to a multiple of 16.
// Floats: keys [position / 16][channel][16 positions], values [position][channel].
// 8 bits: keys [position / 16][channel / 2][16 positions][2], values [position / 2][channel][2], and a float
// scale for every key and every value: pairs lie as the multiply-add of 16-bit pairs wants them.
constexpr int kChunk = 256;
static inline size_t key_index(bool pairs, int padded_dim, int p, int d) {
  const size_t block = size_t(p / 16) * size_t(padded_dim) * 16;
  return block + (pairs ? size_t(d / 2) * 32 + size_t(p % 16) * 2 + size_t(d % 2) : size_t(d) * 16 + size_t(p % 16));
}
static inline size_t value_index(bool pairs, int padded_dim, int p, int d) {
  return pairs ? size_t(p / 2) * size_t(padded_dim) * 2 + size_t(d) * 2 + size_t(p % 2) : size_t(p) * size_t(padded_dim) + size_t(d);
}
constexpr int kMaxQueries = 32;

struct AttendCall {
  int cache_type;
  int head_dim, padded_dim;
  const uint8_t* keys;
  const uint8_t* values;
  const float* key_scales;
  const float* value_scales;
  int num_queries;
  const float* queries[kMaxQueries];
  int begin[kMaxQueries], end[kMaxQueries];  // positions of the chunk that a query sees
  float scale;
  float* scratch;  // kAttendScratch floats
  float* out;      // [query][padded_dim], not yet divided by the sum
  float* largest;  // [query]
  float* total;    // [query]
};
static inline size_t attend_scratch_floats(int padded_dim) {
  return size_t(kMaxQueries) * kChunk + size_t(padded_dim) * 64;
}

struct Kernels {
  const char* name;
  int wide_from;  // places of a step from which int8 panels are wide; 0: never
  void (*linear)(const LinearCall&);
  // y = x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, float* y, int n, float epsilon);
  // One token into its place or places of a panel: token t of the panel's `tokens`.
  void (*quantize)(const float* x, int n, uint8_t* panel, int t, int tokens, int places);
  void (*attend)(const AttendCall&);
  // Add a chunk's part (m2, l2, o2) to the running (m, l, o).
  void (*merge)(float* m, float* l, float* o, float m2, float l2, const float* o2, int padded_dim);
  // Write one position's key and value of one head (p: position in the chunk).
  void (*store_kv)(int cache_type, const float* key, const float* value, int head_dim, int padded_dim, int p,
                   uint8_t* keys, uint8_t* values, float* key_scales, float* value_scales);
  // Rotate one head in place.
  void (*rope)(float* x, const float* cosines, const float* sines, int head_dim, bool interleaved);
  // The inner instruction, `rounds` times 6 x 8 of them on 16 rows each: for the rate probe.
  int64_t (*int8_probe)(int64_t rounds);
  // Sum of bytes read, 64 at a time.
  uint64_t (*read_probe)(const uint8_t* data, size_t bytes);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512vnni;
#if defined(POCKETPHI_AMX)
const Kernels& kernels_amx();
bool amx_permitted();  // asks the system for the tile registers; once is enough for all threads
#endif
#endif
#if defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

// One stretch-free view for the float path: columns [32 * group, ...) of a tile as float32
// [columns][32 rows], in the arithmetic of the formats' reference. Plain C++ (pack.cpp).
void unpack_group(int pack, const uint8_t* tile, int group, int cols, float* out);

}  // namespace pp
