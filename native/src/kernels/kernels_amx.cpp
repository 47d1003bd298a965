// Matrices of 8-bit activations and 4- to 8-bit weights for many tokens with the tile registers of AMX; the rest is
// the AVX-512 kernel set's.
//
// Activations and weights are whole numbers of at most 8 bits, which bf16 holds exactly, and their sums over a group
// stay below 2^24, which float32 holds exactly: products of bf16 give the same sums as those of int8, as floats.
// That matters because with tiles in use these processors multiply and convert 512 bits of floats once a cycle
// instead of twice, and turning a group's sums into results is what takes the time: without conversions, a product
// of scales and a multiply-add are left of three instructions. Scales are applied in the order of kernels.inc, so
// the results are the same bits.
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
  PP_LOAD_TILE(a, x, 64);                                            \
  PP_LOAD_TILE(b, w, 64);                                            \
  __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #i ::)

constexpr int kBlockGroups = 8;           // their weights fit the first-level cache beside a panel's activations
constexpr int kRunPanels = 16;            // whose sums stay in the second-level cache
constexpr size_t kRunBytes = 1280 << 10;  // of panels, which stay there while tile after tile is multiplied
constexpr int kUnits = 4;                 // products under way at once

constexpr int kFewestQueries = 6;  // for which attention by tiles is the faster
constexpr size_t kFarAhead = 2304;

// Weights of a stretch of columns as bf16, with their scales. A row of 64 bytes holds two columns of 16 rows of the
// matrix, in the order that wide panels have (see kernels.h).
struct alignas(64) Block {
  uint16_t weights[kBlockGroups][2][16][32];
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
    shapes.rows[i] = uint8_t(i < 6 ? places : cols / 2);
    shapes.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 2 * cols : 64);
  }
  PP_SHAPE_TILES(shapes);
}

// bf16 of the whole numbers from `first` on.
struct alignas(64) Numbers {
  uint16_t of[64];
  constexpr explicit Numbers(int first, int period) : of{} {
    for (int i = 0; i < 64; ++i) of[i] = uint16_t(__builtin_bit_cast(uint32_t, float(first + i % period)) >> 16);
  }
  __m512i low() const { return _mm512_load_si512(of); }
  __m512i high() const { return _mm512_load_si512(of + 32); }
};
// Looked up by the low 5 bits (6 from two registers) of 16, so what lies above them does not matter.
constexpr Numbers kFrom0To15(0, 16), kFrom8Below(-8, 16), kFrom0To31(0, 32), kFrom32Below(-32, 64);

template <int by>
inline __attribute__((always_inline)) __m512i shifted_right(const __m512i& x) {
  if constexpr (by > 0) return _mm512_srli_epi16(x, by);
  if constexpr (by < 0) return _mm512_slli_epi16(x, -by);
  return x;
}
// The low 4 bits of each 16 from the first, the rest from the second.
inline __m512i joined(const __m512i& low, const __m512i& rest) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, rest, 0xca);
}

// A piece of nibbles: 8 columns, two by two.
inline void put_nibbles(uint16_t (*to)[32], const uint8_t* piece, const __m512i& numbers) {
  const __m512i x = load_w(piece).a;
  _mm512_store_si512(to[0], _mm512_permutexvar_epi16(x, numbers));
  _mm512_store_si512(to[1], _mm512_permutexvar_epi16(shifted_right<4>(x), numbers));
  _mm512_store_si512(to[2], _mm512_permutexvar_epi16(shifted_right<8>(x), numbers));
  _mm512_store_si512(to[3], _mm512_permutexvar_epi16(shifted_right<12>(x), numbers));
}
// The same with a fifth bit each: bits `quad` and `quad` + 1 of the bytes of `fifth`.
template <int quad>
inline void put_five_bits(uint16_t (*to)[32], const uint8_t* piece, const __m512i& fifth, const __m512i& numbers) {
  const __m512i x = load_w(piece).a;
  _mm512_store_si512(to[0], _mm512_permutexvar_epi16(joined(x, shifted_right<quad - 4>(fifth)), numbers));
  _mm512_store_si512(to[1], _mm512_permutexvar_epi16(joined(shifted_right<4>(x), shifted_right<quad - 3>(fifth)), numbers));
  _mm512_store_si512(to[2], _mm512_permutexvar_epi16(joined(shifted_right<8>(x), shifted_right<quad + 4>(fifth)), numbers));
  _mm512_store_si512(to[3], _mm512_permutexvar_epi16(joined(shifted_right<12>(x), shifted_right<quad + 5>(fifth)), numbers));
}
// The same with two bits more each: pairs `quad` and `quad` + 1 of the bytes of `pairs`.
template <int quad>
inline void put_six_bits(uint16_t (*to)[32], const uint8_t* piece, const __m512i& pairs, const __m512i& low, const __m512i& high) {
  const __m512i x = load_w(piece).a;
  const auto numbers = [&](const __m512i& index) { return _mm512_permutex2var_epi16(low, index, high); };
  _mm512_store_si512(to[0], numbers(joined(x, shifted_right<2 * quad - 4>(pairs))));
  _mm512_store_si512(to[1], numbers(joined(shifted_right<4>(x), shifted_right<2 * quad - 2>(pairs))));
  _mm512_store_si512(to[2], numbers(joined(shifted_right<8>(x), shifted_right<2 * quad + 4>(pairs))));
  _mm512_store_si512(to[3], numbers(joined(shifted_right<12>(x), shifted_right<2 * quad + 6>(pairs))));
}
// Two pieces of int8, 4 columns each.
inline void put_bytes(uint16_t (*to)[32], const uint8_t* pieces) {
  for (int i = 0; i < 2; ++i) {
    const __m512i x = load_w(pieces + 64 * i).a;
    const auto number = [&](unsigned byte) {
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * byte), 24)));
    };
    const auto both = [](const __m512i& first, const __m512i& second) {
      return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
    };
    _mm512_store_si512(to[i], both(number(0), number(2)));
    _mm512_store_si512(to[2 + i], both(number(1), number(3)));
  }
}

// `groups` groups from `tile` on; returns where the next begins.
template <int pack>
const uint8_t* unpack_block(const uint8_t* tile, int groups, Block& block) {
  const uint16_t* d = nullptr;
  for (int g = 0; g < groups; ++g) {
    auto& to = block.weights[g];
    if constexpr (pack == kPackQ4K || pack == kPackQ5K || pack == kPackQ6K) {
      if (g % 8 == 0) {
        d = reinterpret_cast<const uint16_t*>(tile);
        tile += pack == kPackQ6K ? 64 : 128;
      }
    }
    if constexpr (pack == kPackQ8) {
      for (int v = 0; v < 2; ++v)
        for (int c = 0; c < 4; ++c) put_bytes(to[v] + 4 * c, tile + 512 * v + 128 * c);
      d = reinterpret_cast<const uint16_t*>(tile + 1024);
      for (int v = 0; v < 2; ++v) store(block.scales[g][v], load_half(d + 16 * v));
      tile += 1088;
    } else if constexpr (pack == kPackQ4S || pack == kPackQ4A || pack == kPackQ4K) {
      const __m512i numbers = (pack == kPackQ4S ? kFrom8Below : kFrom0To15).low();
      for (int v = 0; v < 2; ++v)
        for (int c = 0; c < 4; ++c) put_nibbles(to[v] + 4 * c, tile + 256 * v + 64 * c, numbers);
    } else if constexpr (pack == kPackQ5K) {
      const __m512i numbers = kFrom0To31.low();
      for (int v = 0; v < 2; ++v) {
        const uint8_t* nibbles = tile + 256 * v;
        const __m512i fifth = load_w(tile + 512 + 64 * v).a;
        put_five_bits<0>(to[v], nibbles, fifth, numbers);
        put_five_bits<2>(to[v] + 4, nibbles + 64, fifth, numbers);
        put_five_bits<4>(to[v] + 8, nibbles + 128, fifth, numbers);
        put_five_bits<6>(to[v] + 12, nibbles + 192, fifth, numbers);
      }
    } else {
      static_assert(pack == kPackQ6K);
      const __m512i low = kFrom32Below.low(), high = kFrom32Below.high();
      for (int v = 0; v < 2; ++v) {
        for (int h = 0; h < 2; ++h) {
          const __m512i pairs = load_w(tile + 512 + 128 * v + 64 * h).a;
          const uint8_t* nibbles = tile + 256 * v + 128 * h;
          put_six_bits<0>(to[v] + 8 * h, nibbles, pairs, low, high);
          put_six_bits<2>(to[v] + 8 * h + 4, nibbles + 64, pairs, low, high);
          store(block.parts[g][v][h], to_float(load_i8(reinterpret_cast<const int8_t*>(tile + 768 + 32 * h + 16 * v))));
        }
        store(block.scales[g][v], load_half(d + 16 * v));
      }
      tile += 832;
    }
    if constexpr (pack == kPackQ4S || pack == kPackQ4A) {
      d = reinterpret_cast<const uint16_t*>(tile + 512);
      for (int v = 0; v < 2; ++v) {
        store(block.scales[g][v], load_half(d + 16 * v));
        if constexpr (pack == kPackQ4A) store(block.offsets[g][v], load_half(d + 32 + 16 * v));
      }
      tile += pack == kPackQ4S ? 576 : 640;
    } else if constexpr (pack == kPackQ4K || pack == kPackQ5K) {
      const uint8_t* bytes = tile + (pack == kPackQ4K ? 512 : 640);
      for (int v = 0; v < 2; ++v) {
        store(block.scales[g][v], mul(load_half(d + 16 * v), to_float(load_u8(bytes + 16 * v))));
        store(block.offsets[g][v], mul(load_half(d + 32 + 16 * v), to_float(load_u8(bytes + 32 + 16 * v))));
      }
      tile += pack == kPackQ4K ? 576 : 704;
    }
  }
  return tile;
}

// One group's sums (two halves of one for Q6_K) into those of 16 rows and R places.
template <int pack, int R>
inline __attribute__((always_inline)) void add_group(const Block& block, int g, int v, const float* dot, const uint8_t* record, vf (&acc)[R]) {
  const auto* d = reinterpret_cast<const float*>(record + 64 * kWidePlaces);
  const vf scale = load(block.scales[g][v]);
  if constexpr (pack == kPackQ6K) {
    // Below 2^24, so these are still whole numbers.
    const vf first = load(block.parts[g][v][0]), second = load(block.parts[g][v][1]);
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vf whole = fma(load(dot + 256 + 16 * t), second, mul(load(dot + 16 * t), first));
      acc[t] = fma(whole, mul(scale, set1(d[t])), acc[t]);
    }
  } else if constexpr (pack == kPackQ4S || pack == kPackQ8) {
    PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = fma(load(dot + 16 * t), mul(scale, set1(d[t])), acc[t]);
  } else {
    const vf offset = load(block.offsets[g][v]);
    const float* xs = d + kWidePlaces;
    PP_UNROLL for (int t = 0; t < R; ++t) {
      const vf all = fma(load(dot + 16 * t), mul(scale, set1(d[t])), acc[t]);
      acc[t] = fma(offset, set1(pack == kPackQ4A ? xs[t] : -xs[t]), all);
    }
  }
}

// What lies ahead in memory and is wanted soon: `step` bytes for each group and half of a block.
struct Ahead {
  const uint8_t* from;
  size_t step;
  // Inlined, since GCC takes a function that only prefetches for one without effect.
  inline __attribute__((always_inline)) void fetch(int part) const {
    for (size_t at = 0; at < step; at += 64) prefetch(from + size_t(part) * step + at);
  }
};

template <int pack>
constexpr int kPerGroup = pack == kPackQ6K ? 2 : 1;  // products; a group of Q6_K has two scales

// Adds a whole block's part to the sums [2][16][16] of each of `count` panels. Four products are always under way,
// the next panel's while the last sums of one are added: without that the tiles would stand still at every end.
template <int pack, int R>
__attribute__((noinline)) void add_block(const Block& block, const uint8_t* panel, size_t panel_bytes, int count, float* sums,
                                         const Ahead& ahead) {
  constexpr int per_group = kPerGroup<pack>, units = per_group * kBlockGroups, batch = kUnits / per_group;
  constexpr int second = per_group == 2 ? 32 : kWideRecordBytes, second_row = per_group == 2 ? 256 : 1024;
  constexpr int third = batch / 2 * kWideRecordBytes, third_row = batch / 2 * 1024;
  alignas(64) float dot[kUnits][256];
  const uint8_t* x = panel;
  const uint16_t* w = block.weights[0][0][0];
  PP_PRODUCT(0, 4, 6, x, w);
  PP_PRODUCT(1, 5, 7, x + second, w + second_row);
  PP_PRODUCT(2, 4, 6, x + third, w + third_row);
  PP_PRODUCT(3, 5, 7, x + third + second, w + third_row + second_row);
  for (int b = 0; b < count; ++b, panel += panel_bytes) {
    for (int v = 0; v < 2; ++v, sums += 256) {
      vf acc[R];
      PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = load(sums + 16 * t);
      const uint8_t* record = panel;
      for (int u = 0; u < units; u += kUnits) {
        const int g = u / per_group;
        const bool within = u + kUnits < units;
        const bool more = within || v == 0 || b + 1 < count;
        x = within ? record + batch * kWideRecordBytes : v == 0 ? panel : panel + panel_bytes;
        w = block.weights[within ? g + batch : 0][within ? v : 1 - v][0];
        const auto add = [&](int i) __attribute__((always_inline)) {
          if (b == 0) ahead.fetch(v * kBlockGroups + g + i);
          add_group<pack, R>(block, g + i, v, dot[i * per_group], record, acc);
          record += kWideRecordBytes;
        };
        PP_STORE_TILE(0, dot[0]);
        if (more) {
          PP_PRODUCT(0, 4, 6, x, w);
        }
        if constexpr (per_group == 1) add(0);
        PP_STORE_TILE(1, dot[1]);
        if (more) {
          PP_PRODUCT(1, 5, 7, x + second, w + second_row);
        }
        add(per_group == 1 ? 1 : 0);
        PP_STORE_TILE(2, dot[2]);
        if (more) {
          PP_PRODUCT(2, 4, 6, x + third, w + third_row);
        }
        if constexpr (per_group == 1) add(2);
        PP_STORE_TILE(3, dot[3]);
        if (more) {
          PP_PRODUCT(3, 5, 7, x + third + second, w + third_row + second_row);
        }
        add(per_group == 1 ? 3 : 1);
      }
      PP_UNROLL for (int t = 0; t < R; ++t) store(sums + 16 * t, acc[t]);
    }
  }
}

// The same of the last block of a row that is not a multiple of it: `groups` groups, one after the other.
template <int pack, int R>
__attribute__((noinline)) void add_rest(const Block& block, int groups, const uint8_t* panel, size_t panel_bytes, int count, float* sums) {
  alignas(64) float dot[2][256];
  for (int b = 0; b < count; ++b, panel += panel_bytes) {
    for (int v = 0; v < 2; ++v, sums += 256) {
      vf acc[R];
      PP_UNROLL for (int t = 0; t < R; ++t) acc[t] = load(sums + 16 * t);
      for (int g = 0; g < groups; ++g) {
        const uint8_t* record = panel + g * kWideRecordBytes;
        PP_PRODUCT(0, 4, 6, record, block.weights[g][v][0]);
        PP_STORE_TILE(0, dot[0]);
        if constexpr (kPerGroup<pack> == 2) {
          PP_PRODUCT(1, 5, 7, record + 32, block.weights[g][v][8]);
          PP_STORE_TILE(1, dot[1]);
        }
        add_group<pack, R>(block, g, v, dot[0], record, acc);
      }
      PP_UNROLL for (int t = 0; t < R; ++t) store(sums + 16 * t, acc[t]);
    }
  }
}

// R is the number of places of the largest panel rounded up to 4: what is computed beyond them is of numbers that
// lie there by chance, and is not looked at.
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
      for (int g = 0; g < groups; g += kBlockGroups, panel += kBlockGroups * kWideRecordBytes) {
        const int of_block = groups - g < kBlockGroups ? groups - g : kBlockGroups;
        const uint8_t* next = unpack_block<pack>(tile, of_block, block);
        if (of_block == kBlockGroups)
          add_block<pack, R>(block, panel, panel_bytes, count, sums[0][0][0], {next, size_t(next - tile) / (2 * kBlockGroups)});
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

// The numbers of quantize() in kernels.inc, as bf16: of a whole number below 256 the upper half of its float.
void quantize_wide(const float* x, int n, uint8_t* panel, int t, int places) {
  alignas(64) static constexpr uint16_t order[32] = {1,  5,  9,  13, 3,  7,  11, 15, 17, 21, 25, 29, 19, 23, 27, 31,
                                                     33, 37, 41, 45, 35, 39, 43, 47, 49, 53, 57, 61, 51, 55, 59, 63};
  const __m512i upper_halves = _mm512_load_si512(order);
  for (int g = 0; g < n / kGroup; ++g, x += kGroup, panel += kWideRecordBytes) {
    vf a = load(x), b = load(x + 16);
    for (int place = places * t; place < places * t + places; ++place) {
      auto* d = reinterpret_cast<float*>(panel + 64 * kWidePlaces);
      const float most = largest(max(abs(a), abs(b)));
      const float scale = most * (1.0f / 127.0f);
      const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
      const vf qa = round_even(mul(a, set1(inverse))), qb = round_even(mul(b, set1(inverse)));
      _mm512_store_si512(panel + 64 * place, _mm512_permutex2var_epi16(_mm512_castps_si512(qa.a), upper_halves, _mm512_castps_si512(qb.a)));
      d[place] = scale;
      d[kWidePlaces + place] = scale * sum(add(qa, qb));
      a = fma(qa, set1(-scale), a);
      b = fma(qb, set1(-scale), b);
    }
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
    all.quantize_wide = quantize_wide;
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
