// Matrices of 8-bit integers and 4- to 8-bit weights for many tokens with the tile registers of AMX; the rest is
// the AVX-512 kernel set's.
//
// A tile's 64-byte pieces (4 columns of 16 rows) are what AMX wants of its second operand and the records of a
// wide panel what it wants of its first, so a product is two loads and one instruction for each group of columns.
// Sums of whole numbers are exact, and scales are applied in the order of kernels.inc: the results are the same bits.
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
  __asm__ volatile("tilezero %%tmm" #i ::);                          \
  PP_LOAD_TILE(a, x, 32);                                            \
  PP_LOAD_TILE(b, w, 64);                                            \
  __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #i ::)

constexpr int kBlockGroups = 16;  // their weights fit the first-level cache
constexpr int kRunPanels = 16;    // whose sums stay in the second-level cache
constexpr int kUnits = 4;         // products under way at once

constexpr int kFewestQueries = 6;  // for which attention by tiles is the faster
constexpr size_t kFarAhead = 2304;

// Weights of a stretch of columns as int8, with their scales.
struct alignas(64) Block {
  int8_t weights[kBlockGroups][2][512];
  float scales[kBlockGroups][2][16];
  float offsets[kBlockGroups][2][16];
  int32_t parts[kBlockGroups][2][2][16];  // Q6_K: scales of both halves of a group
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
          _mm512_store_si512(block.parts[g][v][h], load_i8(reinterpret_cast<const int8_t*>(tile + 768 + 32 * h + 16 * v)).a);
        }
        store(block.scales[g][v], load_half(d + 16 * v));
      }
      tile += 832;
    }
  }
  return tile;
}

// One group's sums (two halves of one for Q6_K), to floats and into those of 16 rows and R places.
template <int pack, int R>
inline __attribute__((always_inline)) void add_group(const Block& block, int g, int v, const int32_t* dot, const uint8_t* record,
                                                     int places, vf (&acc)[R]) {
  const auto* d = reinterpret_cast<const float*>(record + 32 * size_t(places));
  const vf scale = load(block.scales[g][v]);
  if constexpr (pack == kPackQ6K) {
    const vi first = {_mm512_load_si512(block.parts[g][v][0])}, second = {_mm512_load_si512(block.parts[g][v][1])};
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vi a = {_mm512_load_si512(dot + 16 * t)}, b = {_mm512_load_si512(dot + 256 + 16 * t)};
      acc[t] = fma(to_float(iadd(imul(a, first), imul(b, second))), mul(scale, set1(d[t])), acc[t]);
    }
  } else if constexpr (pack == kPackQ4S || pack == kPackQ8) {
    PP_UNROLL for (int t = 0; t < R; ++t)
      acc[t] = fma(to_float({_mm512_load_si512(dot + 16 * t)}), mul(scale, set1(d[t])), acc[t]);
  } else {
    const vf offset = load(block.offsets[g][v]);
    const float* xs = d + places;
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vf all = fma(to_float({_mm512_load_si512(dot + 16 * t)}), mul(scale, set1(d[t])), acc[t]);
      acc[t] = fma(offset, set1(pack == kPackQ4A ? xs[t] : -xs[t]), all);
    }
  }
}

// Adds a block's part to the sums [2][16][16] of a panel. R is `places` rounded up to 4: what is computed beyond
// them is of numbers that lie there by chance, and is not looked at. Meanwhile `ahead`, where weights lie that are
// wanted next, is fetched, `ahead_step` bytes for each group and half.
template <int pack, int R>
__attribute__((noinline)) void add_block(const Block& block, int groups, const uint8_t* panel, int places, float* sums,
                                         const uint8_t* ahead, size_t ahead_step) {
  constexpr int per_group = pack == kPackQ6K ? 2 : 1;  // products; a group of Q6_K has two scales
  constexpr int batch = kUnits / per_group;            // groups
  const auto second = [](const uint8_t* x, size_t record) { return per_group == 2 ? x + 16 : x + record; };
  const auto fetch = [&](int g) __attribute__((always_inline)) {
    if (ahead_step == 0) return;
    for (size_t at = 0; at < ahead_step; at += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + size_t(g) * ahead_step + at), _MM_HINT_T0);
  };
  alignas(64) int32_t whole[2][kUnits][256];
  const size_t record = size_t(kRecordBytes) * size_t(places);
  for (int v = 0; v < 2; ++v, ahead += size_t(groups) * ahead_step) {
    float* to = sums + 256 * v;
    vf acc[R];
    PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = load(to + 16 * t);
    const int8_t* w = block.weights[0][v];
    constexpr int w1 = per_group == 2 ? 256 : 1024, w2 = per_group == 2 ? 1024 : 2048, w3 = w1 + w2;
    const uint8_t* x = panel;
    int g = 0;
    if (groups >= batch) {
      // While one batch's sums become floats, the products of the next are under way.
      const size_t x2 = size_t(2 / per_group) * record;
      PP_PRODUCT(0, 4, 6, x, w);
      PP_PRODUCT(1, 5, 7, second(x, record), w + w1);
      PP_PRODUCT(2, 4, 6, x + x2, w + w2);
      PP_PRODUCT(3, 5, 7, second(x + x2, record), w + w3);
      const uint8_t* y = panel;
      int32_t(*dot)[256] = whole[0];
      for (; g + 2 * batch <= groups; g += batch) {
        x += batch * record, w += batch * 1024;
        PP_STORE_TILE(0, dot[0]);
        PP_PRODUCT(0, 4, 6, x, w);
        PP_STORE_TILE(1, dot[1]);
        PP_PRODUCT(1, 5, 7, second(x, record), w + w1);
        fetch(g);
        add_group<pack, R>(block, g, v, dot[0], y, places, acc);
        y += record;
        if constexpr (per_group == 1) {
          fetch(g + 1);
          add_group<pack, R>(block, g + 1, v, dot[1], y, places, acc);
          y += record;
        }
        PP_STORE_TILE(2, dot[2]);
        PP_PRODUCT(2, 4, 6, x + x2, w + w2);
        PP_STORE_TILE(3, dot[3]);
        PP_PRODUCT(3, 5, 7, second(x + x2, record), w + w3);
        fetch(g + batch / 2);
        add_group<pack, R>(block, g + batch / 2, v, dot[2], y, places, acc);
        y += record;
        if constexpr (per_group == 1) {
          fetch(g + 3);
          add_group<pack, R>(block, g + 3, v, dot[3], y, places, acc);
          y += record;
        }
        dot = dot == whole[0] ? whole[1] : whole[0];
      }
      PP_STORE_TILE(0, dot[0]);
      PP_STORE_TILE(1, dot[1]);
      PP_STORE_TILE(2, dot[2]);
      PP_STORE_TILE(3, dot[3]);
      for (int i = 0; i < batch; ++i, ++g, y += record) {
        fetch(g);
        add_group<pack, R>(block, g, v, dot[per_group * i], y, places, acc);
      }
      x += batch * record, w += batch * 1024;
    }
    for (; g < groups; ++g, x += record, w += 1024) {
      PP_PRODUCT(0, 4, 6, x, w);
      PP_STORE_TILE(0, whole[0][0]);
      if constexpr (per_group == 2) {
        PP_PRODUCT(1, 5, 7, x + 16, w + w1);
        PP_STORE_TILE(1, whole[0][1]);
      }
      fetch(g);
      add_group<pack, R>(block, g, v, whole[0][0], x, places, acc);
    }
    PP_UNROLL for (int t = 0; t < R; ++t) store(to + 16 * t, acc[t]);
  }
}
template <int pack>
void linear_wide(const LinearCall& call) {
  const int groups = call.cols / kGroup, panels = num_panels(call.num_tokens, call.places, kWidePlaces);
  const size_t place_bytes = size_t(groups) * kRecordBytes;
  Block block;
  alignas(64) float sums[kRunPanels][2][16][16];
  int shaped = 0;
  for (int index = call.tile_begin; index < call.tile_end; ++index) {
    for (int from = call.panel_begin; from < call.panel_end; from += kRunPanels) {
      const int to = from + kRunPanels < call.panel_end ? from + kRunPanels : call.panel_end;
      __builtin_memset(sums, 0, size_t(to - from) * sizeof sums[0]);
      const uint8_t* tile = call.tiles + size_t(index) * call.tile_bytes;
      for (int g = 0; g < groups; g += kBlockGroups) {
        const int count = groups - g < kBlockGroups ? groups - g : kBlockGroups;
        const uint8_t* next = unpack_block<pack>(tile, count, block);
        const size_t ahead_step = size_t(next - tile) / size_t(2 * count);
        tile = next;
        for (int b = from; b < to; ++b) {
          const int first = panel_start(b, call.num_tokens, panels) * call.places;
          const int places = panel_start(b + 1, call.num_tokens, panels) * call.places - first;
          const uint8_t* panel = call.panels + size_t(first) * place_bytes + size_t(g) * kRecordBytes * size_t(places);
          if (places != shaped) set_shapes(places, pack == kPackQ6K ? 16 : 32), shaped = places;
          float* out = sums[b - from][0][0];
          const size_t step = b == from ? ahead_step : 0;
          switch ((places + 3) / 4) {
            case 1: add_block<pack, 4>(block, count, panel, places, out, next, step); break;
            case 2: add_block<pack, 8>(block, count, panel, places, out, next, step); break;
            case 3: add_block<pack, 12>(block, count, panel, places, out, next, step); break;
            case 4: add_block<pack, 16>(block, count, panel, places, out, next, step); break;
          }
        }
      }
      for (int b = from; b < to; ++b) {
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
