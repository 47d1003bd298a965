// Matrices of 8-bit integers and 4- to 8-bit weights for many tokens with the tile registers of AMX; the rest is
// the AVX-512 kernel set's.
//
// A tile's 64-byte pieces (4 columns of 16 rows) are what AMX wants of its second operand and the records of a
// wide panel what it wants of its first, so a product is two loads and one instruction for each group of columns.
// Sums of whole numbers are exact, and scales are applied in the order of kernels.inc: the results are the same bits.
//
// What takes the time is turning sums into floats. While tiles are in use, multiplications and conversions of 512
// bits are begun once a cycle instead of twice (their second unit is that of the tiles), additions still twice;
// storing a tile takes the port of the second ones 16 times. So whole numbers become floats by additions.
//
// Legend: as in kernels.inc.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

namespace pp {
namespace {

#include "simd_avx512.h"
#include "lanes.inc"

#define PP_UNROLL _Pragma("GCC unroll 16")

// Not the compiler's own functions for tiles: those of GCC 12 do not tell it what memory they read, and stores
// before them are left out.
#define PP_SHAPE_TILES(shapes) __asm__ volatile("ldtilecfg (%0)" ::"r"(&(shapes)) : "memory")
#define PP_LOAD_TILE(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(long(stride)) : "memory")
#define PP_STORE_TILE(tile, to) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(64l) : "memory")
#define PP_PRODUCT(i, a, b, x, w)                                    \
  PP_LOAD_TILE(a, x, 32);                                            \
  PP_LOAD_TILE(b, w, 64);                                            \
  __asm__ volatile("tilezero %%tmm" #i ::);                          \
  __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #i ::)

constexpr int kBlockGroups = 16;          // their weights fit the first-level cache
constexpr int kRunPanels = 16;            // whose sums stay in the second-level cache
constexpr size_t kRunBytes = 960 << 10;   // of panels, which stay there while tile after tile is multiplied
constexpr int kUnits = 4;                 // products under way at once

constexpr int kFewestQueries = 6;  // for which attention by tiles is the faster
constexpr size_t kFarAhead = 2304;

// Weights of a stretch of columns as int8, with their scales.
struct alignas(64) Block {
  int8_t weights[kBlockGroups][2][512];
  float scales[kBlockGroups][2][16];
  float offsets[kBlockGroups][2][16];
  float parts[kBlockGroups][2][2][16];  // Q6_K: scales of both halves of a group
};

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 hold sums, 4 and 5 activations, 6 and 7 weights of `cols` columns.
void set_shapes(int places, int cols) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = uint8_t(i < 6 ? places : cols / 4);
    shapes.row_bytes[i] = uint16_t(i == 4 || i == 5 ? cols : 64);
  }
  PP_SHAPE_TILES(shapes);
}

inline void put_weights(int8_t* to, const w64& w, int less) {
  _mm512_store_si512(to, _mm512_sub_epi8(w.a, _mm512_set1_epi8(char(less))));
}
inline void put_nibbles(int8_t* to, const uint8_t* nibbles, int less) {
  PP_UNROLL for (int c = 0; c < 8; ++c) {
    const w64 raw = load_w(nibbles + 64 * c);
    put_weights(to + 128 * c, low_nibbles(raw), less);
    put_weights(to + 128 * c + 64, high_nibbles(raw), less);
  }
}

// `groups` groups from `tile` on; returns where the next begins.
template <int pack>
const uint8_t* unpack_block(const uint8_t* tile, int groups, Block& block) {
  const uint16_t* d = nullptr;
  for (int g = 0; g < groups; ++g) {
    int8_t* to = block.weights[g][0];
    if constexpr (pack == kPackQ4K || pack == kPackQ5K || pack == kPackQ6K) {
      if (g % 8 == 0) {
        d = reinterpret_cast<const uint16_t*>(tile);
        tile += pack == kPackQ6K ? 64 : 128;
      }
    }
    if constexpr (pack == kPackQ8) {
      for (int c = 0; c < 16; ++c) put_weights(to + 64 * c, load_w(tile + 64 * c), 0);
      d = reinterpret_cast<const uint16_t*>(tile + 1024);
      for (int v = 0; v < 2; ++v) store(block.scales[g][v], load_half(d + 16 * v));
      tile += 1088;
    } else if constexpr (pack == kPackQ4S || pack == kPackQ4A) {
      put_nibbles(to, tile, pack == kPackQ4S ? 8 : 0);
      d = reinterpret_cast<const uint16_t*>(tile + 512);
      for (int v = 0; v < 2; ++v) {
        store(block.scales[g][v], load_half(d + 16 * v));
        if constexpr (pack == kPackQ4A) store(block.offsets[g][v], load_half(d + 32 + 16 * v));
      }
      tile += pack == kPackQ4S ? 576 : 640;
    } else if constexpr (pack == kPackQ4K || pack == kPackQ5K) {
      put_nibbles(to, tile, 0);
      if constexpr (pack == kPackQ5K) {
        for (int v = 0; v < 2; ++v) {
          const __m512i fifth = _mm512_loadu_si512(tile + 512 + 64 * v);
          for (int quad = 0; quad < 8; ++quad) {
            const __m512i bit = _mm512_and_si512(_mm512_slli_epi16(_mm512_srli_epi16(fifth, unsigned(quad)), 4), _mm512_set1_epi8(16));
            int8_t* p = to + 512 * v + 64 * quad;
            _mm512_store_si512(p, _mm512_or_si512(_mm512_load_si512(p), bit));
          }
        }
      }
      const uint8_t* bytes = tile + (pack == kPackQ4K ? 512 : 640);
      for (int v = 0; v < 2; ++v) {
        store(block.scales[g][v], mul(load_half(d + 16 * v), to_float(load_u8(bytes + 16 * v))));
        store(block.offsets[g][v], mul(load_half(d + 32 + 16 * v), to_float(load_u8(bytes + 32 + 16 * v))));
      }
      tile += pack == kPackQ4K ? 576 : 704;
    } else {
      static_assert(pack == kPackQ6K);
      for (int v = 0; v < 2; ++v) {
        for (int h = 0; h < 2; ++h) {
          const w64 pairs = load_w(tile + 512 + 128 * v + 64 * h);
          const uint8_t* nibbles = tile + 256 * v + 128 * h;
          int8_t* p = to + 512 * v + 256 * h;
          put_weights(p, with_high<0, 2>(low_nibbles(load_w(nibbles)), pairs), 32);
          put_weights(p + 64, with_high<2, 2>(high_nibbles(load_w(nibbles)), pairs), 32);
          put_weights(p + 128, with_high<4, 2>(low_nibbles(load_w(nibbles + 64)), pairs), 32);
          put_weights(p + 192, with_high<6, 2>(high_nibbles(load_w(nibbles + 64)), pairs), 32);
          store(block.parts[g][v][h], to_float(load_i8(reinterpret_cast<const int8_t*>(tile + 768 + 32 * h + 16 * v))));
        }
        store(block.scales[g][v], load_half(d + 16 * v));
      }
      tile += 832;
    }
  }
  return tile;
}

// Sixteen whole numbers of less than 2^22 as floats: in the sum with 1.5 * 2^23, read as one, they are the last bits.
inline __attribute__((always_inline)) vf small_to_float(const int32_t* p) {
  const __m512i shifted = _mm512_add_epi32(_mm512_load_si512(p), _mm512_set1_epi32(0x4b400000));
  return sub({_mm512_castsi512_ps(shifted)}, set1(12582912.0f));
}

// One group's sums (two halves of one for Q6_K) into those of 16 rows and R places.
template <int pack, int R>
inline __attribute__((always_inline)) void add_group(const Block& block, int g, int v, const int32_t* dot, const uint8_t* record, vf (&acc)[R]) {
  const auto* d = reinterpret_cast<const float*>(record + 32 * kWidePlaces);
  const vf scale = load(block.scales[g][v]);
  if constexpr (pack == kPackQ6K) {
    // Whole numbers up to the end: 2 * 16 * 32 * 127 * 128 is below 2^24.
    const vf first = load(block.parts[g][v][0]), second = load(block.parts[g][v][1]);
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vf whole = fma(small_to_float(dot + 256 + 16 * t), second, mul(small_to_float(dot + 16 * t), first));
      acc[t] = fma(whole, mul(scale, set1(d[t])), acc[t]);
    }
  } else if constexpr (pack == kPackQ4S || pack == kPackQ8) {
    PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = fma(small_to_float(dot + 16 * t), mul(scale, set1(d[t])), acc[t]);
  } else {
    const vf offset = load(block.offsets[g][v]);
    const float* xs = d + kWidePlaces;
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vf all = fma(small_to_float(dot + 16 * t), mul(scale, set1(d[t])), acc[t]);
      acc[t] = fma(offset, set1(pack == kPackQ4A ? xs[t] : -xs[t]), all);
    }
  }
}

template <int pack>
constexpr int kPerGroup = pack == kPackQ6K ? 2 : 1;  // products; a group of Q6_K has two scales

// Where the sums of a run's panels will go.
struct Results {
  const float* first;  // of token 0
  size_t stride;
  int begin, tokens, panels;
  const float* of(int b) const { return first + size_t(panel_start(begin + b, tokens, panels)) * stride; }
};

// Adds a whole block's part to the sums [2][16][16] of each of `count` panels, whose records of the block begin at
// `panel` and `step` bytes on. What is computed of places beyond a panel's is of activations that lie there by
// chance, and is not looked at. Four products are always under way, the next panel's while the last sums of one are
// added: without that the tiles would stand still at every end. Meanwhile `ahead`, where weights lie that are wanted
// next, is fetched, `ahead_step` bytes for each group and half, and if `results` is given the places it names.
template <int pack, int R>
__attribute__((noinline)) void add_block(const Block& block, const uint8_t* panel, size_t step, int count, float* sums, const uint8_t* ahead,
                                         size_t ahead_step, const Results* results) {
  constexpr int per_group = kPerGroup<pack>, batch = kUnits / per_group;
  constexpr int second = per_group == 2 ? 16 : kWideRecordBytes, third = batch / 2 * kWideRecordBytes;
  constexpr int second_row = per_group == 2 ? 256 : 1024, third_row = batch / 2 * 1024;
  alignas(64) int32_t dot[kUnits][256];
  const uint8_t* x = panel;
  const int8_t* w = block.weights[0][0];
  PP_PRODUCT(0, 4, 6, x, w);
  PP_PRODUCT(1, 5, 7, x + second, w + second_row);
  PP_PRODUCT(2, 4, 6, x + third, w + third_row);
  PP_PRODUCT(3, 5, 7, x + third + second, w + third_row + second_row);
  for (int b = 0; b < count; ++b, panel += step) {
    for (int v = 0; v < 2; ++v, sums += 256) {
      vf acc[R];
      PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = load(sums + 16 * t);
      // After the last panel its own first products are begun again, for nothing.
      const uint8_t* next = v == 0 || b + 1 == count ? panel : panel + step;
      const uint8_t* y = panel;
      const float* out = results ? results->of(b) + 16 * v : nullptr;
      const size_t stride = results ? results->stride : 0;
      for (int g = 0; g < kBlockGroups; g += batch, y += batch * kWideRecordBytes) {
        const bool within = g + batch < kBlockGroups;
        x = within ? y + batch * kWideRecordBytes : next;
        w = within ? block.weights[g + batch][v] : block.weights[0][1 - v];
        const auto add = [&](int i) __attribute__((always_inline)) {
          if (b == 0)
            for (size_t at = 0; at < ahead_step; at += 64) prefetch(ahead + at);
          ahead += ahead_step;
          if (out) __asm__ volatile("prefetchw (%0)" ::"r"(out));
          out += stride;
          add_group<pack, R>(block, g + i, v, dot[i * per_group], y + i * kWideRecordBytes, acc);
        };
        PP_STORE_TILE(0, dot[0]);
        PP_PRODUCT(0, 4, 6, x, w);
        if constexpr (per_group == 1) add(0);
        PP_STORE_TILE(1, dot[1]);
        PP_PRODUCT(1, 5, 7, x + second, w + second_row);
        add(per_group == 1 ? 1 : 0);
        PP_STORE_TILE(2, dot[2]);
        PP_PRODUCT(2, 4, 6, x + third, w + third_row);
        if constexpr (per_group == 1) add(2);
        PP_STORE_TILE(3, dot[3]);
        PP_PRODUCT(3, 5, 7, x + third + second, w + third_row + second_row);
        add(per_group == 1 ? 3 : 1);
      }
      PP_UNROLL for (int t = 0; t < R; ++t) store(sums + 16 * t, acc[t]);
    }
  }
}

// The same of the last block of rows whose length is not a multiple of it: `groups` groups, one after the other.
template <int pack, int R>
__attribute__((noinline)) void add_rest(const Block& block, int groups, const uint8_t* panel, size_t step, int count, float* sums) {
  alignas(64) int32_t dot[2][256];
  for (int b = 0; b < count; ++b, panel += step) {
    for (int v = 0; v < 2; ++v, sums += 256) {
      vf acc[R];
      PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = load(sums + 16 * t);
      for (int g = 0; g < groups; ++g) {
        const uint8_t* x = panel + g * kWideRecordBytes;
        PP_PRODUCT(0, 4, 6, x, block.weights[g][v]);
        PP_STORE_TILE(0, dot[0]);
        if constexpr (kPerGroup<pack> == 2) {
          PP_PRODUCT(1, 5, 7, x + 16, block.weights[g][v] + 256);
          PP_STORE_TILE(1, dot[1]);
        }
        add_group<pack, R>(block, g, v, dot[0], x, acc);
      }
      PP_UNROLL for (int t = 0; t < R; ++t) store(sums + 16 * t, acc[t]);
    }
  }
}

// R is the number of places of the largest panel rounded up to 4.
template <int pack, int R>
void linear_wide(const LinearCall& call) {
  const int groups = call.cols / kGroup, panels = num_panels(call.num_tokens, call.places, kWidePlaces);
  const size_t panel_bytes = size_t(groups) * kWideRecordBytes;
  // Runs of panels, as equal as they can be.
  const int all = call.panel_end - call.panel_begin, fit = int(kRunBytes / panel_bytes);
  const int longest = fit < 1 ? 1 : fit > kRunPanels ? kRunPanels : fit, runs = (all + longest - 1) / longest;
  Block block;
  alignas(64) float sums[kRunPanels][2][16][16];
  set_shapes(R, pack == kPackQ6K ? 16 : 32);
  for (int run = 0; run < runs; ++run) {
    const int from = call.panel_begin + all * run / runs, count = call.panel_begin + all * (run + 1) / runs - from;
    for (int index = call.tile_begin; index < call.tile_end; ++index) {
      __builtin_memset(sums, 0, size_t(count) * sizeof sums[0]);
      const uint8_t* tile = call.tiles + size_t(index) * call.tile_bytes;
      const uint8_t* panel = call.panels + size_t(from) * panel_bytes;
      const Results results = {call.out + size_t(index) * (call.epilogue == kSiluMul ? 16 : 32), call.out_stride, from, call.num_tokens, panels};
      for (int g = 0; g < groups; g += kBlockGroups, panel += kBlockGroups * kWideRecordBytes) {
        const int of_block = groups - g < kBlockGroups ? groups - g : kBlockGroups;
        const uint8_t* next = unpack_block<pack>(tile, of_block, block);
        if (of_block == kBlockGroups)
          add_block<pack, R>(block, panel, panel_bytes, count, sums[0][0][0], next, size_t(next - tile) / (2 * kBlockGroups),
                             g + 2 * kBlockGroups > groups ? &results : nullptr);
        else
          add_rest<pack, R>(block, of_block, panel, panel_bytes, count, sums[0][0][0]);
        tile = next;
      }
      for (int b = from; b < from + count; ++b) {
        const int first = panel_start(b, call.num_tokens, panels), tokens = panel_start(b + 1, call.num_tokens, panels) - first;
        const auto& low = sums[b - from][0];
        const auto& high = sums[b - from][1];
        for (int t = 0; t < tokens; ++t) {
          if (call.places == 2)
            put_token(call, index, first + t, add(load(low[2 * t]), load(low[2 * t + 1])), add(load(high[2 * t]), load(high[2 * t + 1])));
          else
            put_token(call, index, first + t, load(low[t]), load(high[t]));
        }
      }
    }
  }
  _tile_release();
}

template <int pack>
void linear_wide(const LinearCall& call) {
  const int panels = num_panels(call.num_tokens, call.places, kWidePlaces);
  const int most = (call.num_tokens + panels - 1) / panels * call.places;  // places of the largest panel
  switch ((most + 3) / 4) {
    case 1: return linear_wide<pack, 4>(call);
    case 2: return linear_wide<pack, 8>(call);
    case 3: return linear_wide<pack, 12>(call);
    case 4: return linear_wide<pack, 16>(call);
  }
}

// ---- attention over an 8-bit cache -----------------------------------------------------------------------------
//
// Queries and weights of 16 bits as two numbers of 8, x = 256 high + low with low from 0 to 255: the products of
// both are added at the end, so the sums are those of attention.inc. Pairs of the cache become AMX's fours.

constexpr int kWidest = 256;  // channels of a head

inline __m512i pairs_to_fours(const __m512i& pairs) {
  alignas(64) static constexpr int16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), pairs);
}

// Numbers of 16 queries or rows of weights in two bytes each.
struct alignas(64) Halves {
  int8_t high[kMaxQueries][kWidest];
  uint8_t low[kMaxQueries][kWidest];

  // `count` numbers, then zeros up to a multiple of 64; `count` is a multiple of 16.
  void put(int row, const int16_t* x, int count) {
    for (int i = 0; i < count; i += 16) {
      const __m256i words = load256(x + i);
      _mm_store_si128(reinterpret_cast<__m128i*>(high[row] + i), _mm256_cvtepi16_epi8(_mm256_srai_epi16(words, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(low[row] + i), _mm256_cvtepi16_epi8(words));
    }
    for (int i = count; i % 64; i += 16) {
      _mm_store_si128(reinterpret_cast<__m128i*>(high[row] + i), _mm_setzero_si128());
      _mm_store_si128(reinterpret_cast<__m128i*>(low[row] + i), _mm_setzero_si128());
    }
  }
};

// 32 rows of `halves` times `tiles` tiles of fours, 16 columns: the products' sums, high and low.
template <bool more>
inline __attribute__((always_inline)) void half_products(const Halves& halves, const int8_t (*fours)[64], int tiles,
                                                         int32_t (*sums)[256]) {
  __asm__ volatile("tilezero %%tmm0\n\ttilezero %%tmm1" ::);
  if constexpr (more) __asm__ volatile("tilezero %%tmm2\n\ttilezero %%tmm3" ::);
  for (int k = 0; k < tiles; ++k) {
    PP_LOAD_TILE(6, fours[16 * k], 64);
    PP_LOAD_TILE(4, halves.high[0] + 64 * k, kWidest);
    PP_LOAD_TILE(5, halves.low[0] + 64 * k, kWidest);
    __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm6, %%tmm5, %%tmm1" ::);
    if constexpr (more) {
      PP_LOAD_TILE(4, halves.high[16] + 64 * k, kWidest);
      PP_LOAD_TILE(5, halves.low[16] + 64 * k, kWidest);
      __asm__ volatile("tdpbssd %%tmm6, %%tmm4, %%tmm2\n\ttdpbusd %%tmm6, %%tmm5, %%tmm3" ::);
    }
  }
  PP_STORE_TILE(0, sums[0]);
  PP_STORE_TILE(1, sums[1]);
  if constexpr (more) {
    PP_STORE_TILE(2, sums[2]);
    PP_STORE_TILE(3, sums[3]);
  }
}

// Sums of query j.
inline vf whole_sum(const int32_t (*sums)[256], int j) {
  const int32_t* high = sums[2 * (j / 16)] + 16 * (j % 16);
  return to_float({_mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 8), _mm512_load_si512(high + 256))});
}

template <bool more>
void attend_wide(const AttendCall& call) {
  const int nq = call.num_queries, dim = call.padded_dim;
  const Seen seen(call);
  float* scores = call.scratch;
  Halves halves;
  alignas(64) int8_t fours[kWidest / 4][64];
  alignas(64) int32_t sums[4][256];
  alignas(64) int16_t row[kWidest];
  float scales[kMaxQueries];
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;
  PP_SHAPE_TILES(shapes);
  const int tiles = (dim + 63) / 64;
  for (int i = dim / 4; i < 16 * tiles; ++i) _mm512_store_si512(fours[i], _mm512_setzero_si512());
  for (int j = 0; j < nq; ++j) {
    scales[j] = to_16_bits(call.queries[j], call.head_dim, dim, 32767.0f, row) * call.scale;
    halves.put(j, row, dim);
  }
  const auto* keys = reinterpret_cast<const int8_t*>(call.keys) + size_t(seen.first_block) * size_t(dim) * 16;
  for (int block = seen.first_block; block < seen.last_block; ++block) {
    for (int i = 0; i < dim / 4; ++i, keys += 64) {
      prefetch(keys + kFarAhead);
      _mm512_store_si512(fours[i], pairs_to_fours(_mm512_loadu_si512(keys)));
    }
    half_products<more>(halves, fours, tiles, sums);
    const vf key_scales = load(call.key_scales + 16 * block);
    for (int j = 0; j < nq; ++j) store(scores + size_t(j) * kChunk + 16 * block, mul(mul(whole_sum(sums, j), key_scales), set1(scales[j])));
  }
  softmax(call, seen, scores);
  const int low = 16 * seen.first_block, count = 16 * (seen.last_block - seen.first_block);
  for (int j = 0; j < nq; ++j) {
    scales[j] = to_16_bits(scores + size_t(j) * kChunk + low, count, count, 32767.0f, row);
    halves.put(j, row, count);
  }
  const auto* values = reinterpret_cast<const int8_t*>(call.values) + size_t(low) * size_t(dim);
  for (int channel = 0; channel < dim; channel += 16) {
    for (int i = 0; i < count / 4; ++i) {
      const int8_t* pairs = values + (size_t(2 * i) * size_t(dim) + size_t(channel)) * 2;
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load256(pairs)), load256(pairs + 2 * dim), 1);
      _mm512_store_si512(fours[i], pairs_to_fours(both));
    }
    half_products<more>(halves, fours, (count + 63) / 64, sums);
    for (int j = 0; j < nq; ++j) store(call.out + size_t(j) * size_t(dim) + channel, mul(whole_sum(sums, j), set1(scales[j])));
  }
  _tile_release();
}

void attend(const AttendCall& call) {
  if (call.cache_type != 2 || call.num_queries < kFewestQueries || call.padded_dim > kWidest) return kernels_avx512vnni.attend(call);
  if (call.num_queries > 16) attend_wide<true>(call);
  else attend_wide<false>(call);
}

void linear(const LinearCall& call) {
  if (call.float_panels || call.panel_places != kWidePlaces) return kernels_avx512vnni.linear(call);
  switch (call.pack) {
    case kPackQ8: linear_wide<kPackQ8>(call); break;
    case kPackQ4S: linear_wide<kPackQ4S>(call); break;
    case kPackQ4A: linear_wide<kPackQ4A>(call); break;
    case kPackQ4K: linear_wide<kPackQ4K>(call); break;
    case kPackQ5K: linear_wide<kPackQ5K>(call); break;
    case kPackQ6K: linear_wide<kPackQ6K>(call); break;
  }
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels kernels = [] {
    Kernels all = kernels_avx512vnni;
    all.name = "amx";
    all.wide_from = 7;
    all.linear = linear;
    all.attend = attend;
    return all;
  }();
  return kernels;
}

bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace pp
