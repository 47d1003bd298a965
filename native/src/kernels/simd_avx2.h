// Sixteen lanes as two AVX2 registers (needs FMA and F16C). Included in an anonymous namespace.

struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
#define PP_INLINE inline __attribute__((always_inline))

PP_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PP_INLINE void store(float* p, const vf& x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
PP_INLINE vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PP_INLINE vf fma(const vf& x, const vf& y, const vf& z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PP_INLINE vf add(const vf& x, const vf& y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PP_INLINE vf sub(const vf& x, const vf& y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PP_INLINE vf mul(const vf& x, const vf& y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PP_INLINE vf div(const vf& x, const vf& y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PP_INLINE vf max(const vf& x, const vf& y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PP_INLINE vf min(const vf& x, const vf& y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PP_INLINE vf abs(const vf& x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
PP_INLINE vf round_even(const vf& x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
PP_INLINE vi to_int(const vf& x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
PP_INLINE vf to_float(const vi& x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PP_INLINE vf pow2(const vi& n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
PP_INLINE vi iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PP_INLINE vi iadd(const vi& x, const vi& y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PP_INLINE vi isub(const vi& x, const vi& y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
PP_INLINE vi imul(const vi& x, const vi& y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
PP_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
PP_INLINE vf load_half(const uint16_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
PP_INLINE void store_half(uint16_t* p, const vf& x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
PP_INLINE vf load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16))};
}
PP_INLINE __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
PP_INLINE vi load_i8(const int8_t* p) { return {_mm256_cvtepi8_epi32(load64(p)), _mm256_cvtepi8_epi32(load64(p + 8))}; }
PP_INLINE vi load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(load64(p)), _mm256_cvtepu8_epi32(load64(p + 8))}; }
PP_INLINE void store_i8(int8_t* p, const vi& x) {
  // Packing works within 128-bit halves: put the halves right before narrowing to bytes.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
PP_INLINE void store_i16(int16_t* p, const vi& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
// Sixteen lanes of two 16-bit numbers, and two numbers for all lanes.
struct vp {
  __m256i a, b;
};
using x2 = __m256i;
PP_INLINE vp load_pairs(const int8_t* p) { return {_mm256_cvtepi8_epi16(load128(p)), _mm256_cvtepi8_epi16(load128(p + 16))}; }
PP_INLINE x2 broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}
// Inline assembly for the reason given below at multiply_add.
PP_INLINE void add_pair(__m256i& s, const __m256i& w, const __m256i& x) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(s), "=&x"(products) : "x"(w), "x"(x));
}
PP_INLINE void add_products(vi& s, const vp& w, const x2& x) {
  add_pair(s.a, w.a, x);
  add_pair(s.b, w.b, x);
}
PP_INLINE float sum(const vf& x) {
  const __m256 t8 = _mm256_add_ps(x.a, x.b);
  const __m128 t4 = _mm_add_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
  const __m128 t2 = _mm_add_ps(t4, _mm_movehl_ps(t4, t4));
  return _mm_cvtss_f32(_mm_add_ss(t2, _mm_movehdup_ps(t2)));
}
PP_INLINE int32_t isum(const vi& x) {
  const __m256i t8 = _mm256_add_epi32(x.a, x.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(t8), _mm256_extracti128_si256(t8, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
  return _mm_cvtsi128_si32(t);
}
PP_INLINE float largest(const vf& x) {
  const __m256 t8 = _mm256_max_ps(x.a, x.b);
  const __m128 t4 = _mm_max_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
  const __m128 t2 = _mm_max_ps(t4, _mm_movehl_ps(t4, t4));
  return _mm_cvtss_f32(_mm_max_ss(t2, _mm_movehdup_ps(t2)));
}

struct w64 {
  __m256i a, b;
};
PP_INLINE w64 load_w(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
PP_INLINE w64 low_nibbles(const w64& x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
PP_INLINE w64 high_nibbles(const w64& x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
template <int shift, int count>
PP_INLINE __m256i bits_to_4(__m256i x) {
  const __m256i mask = _mm256_set1_epi8(char(((1 << count) - 1) << 4));
  if constexpr (shift < 4) return _mm256_and_si256(_mm256_slli_epi16(x, 4 - shift), mask);
  if constexpr (shift > 4) return _mm256_and_si256(_mm256_srli_epi16(x, shift - 4), mask);
  return _mm256_and_si256(x, mask);
}
template <int shift, int count>
PP_INLINE w64 with_high(const w64& base, const w64& high) {
  return {_mm256_or_si256(base.a, bits_to_4<shift, count>(high.a)), _mm256_or_si256(base.b, bits_to_4<shift, count>(high.b))};
}

using x4 = __m256i;
PP_INLINE x4 broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}

// Inline assembly, because GCC 12 turns a chain of these additions into a tree whose leaves it spills.
PP_INLINE void multiply_add(__m256i& s, const __m256i& w, const __m256i& x) {
  __m256i pairs;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(s), "=&x"(pairs) : "x"(w), "x"(x));
}

// Pairs are summed in 16 bits: 2 · max_weight · 127 · quads must stay below 32768, else the sum is
// widened to 32 bits after every `limit` additions. |x| <= 127.
template <int max_weight, int quads>
struct Dot {
  static constexpr int limit = 32767 / (2 * max_weight * 127);
  static_assert(limit >= 1);
  static constexpr bool narrow = limit >= quads;
  __m256i a, b, wide_a, wide_b;
  int count;
  PP_INLINE void clear() {
    a = b = _mm256_setzero_si256();
    if constexpr (!narrow) wide_a = wide_b = _mm256_setzero_si256(), count = 0;
  }
  PP_INLINE void start(const w64& w, const x4& x) {
    a = _mm256_maddubs_epi16(w.a, x);
    b = _mm256_maddubs_epi16(w.b, x);
    if constexpr (!narrow) wide_a = wide_b = _mm256_setzero_si256(), count = 1;
  }
  PP_INLINE void add(const w64& w, const x4& x) {
    multiply_add(a, w.a, x);
    multiply_add(b, w.b, x);
    if constexpr (!narrow) {
      if (++count == limit) widen();
    }
  }
  PP_INLINE void widen() {
    const __m256i ones = _mm256_set1_epi16(1);
    wide_a = _mm256_add_epi32(wide_a, _mm256_madd_epi16(a, ones));
    wide_b = _mm256_add_epi32(wide_b, _mm256_madd_epi16(b, ones));
    a = b = _mm256_setzero_si256();
    count = 0;
  }
  PP_INLINE vi value() {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (narrow) return {_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)};
    if (count) widen();
    return {wide_a, wide_b};
  }
};
// Signed weights: |w| · (x with the sign of w); one pair sum is at most 2 · 128 · 127.
struct DotSigned {
  __m256i a, b;
  PP_INLINE void clear() { a = b = _mm256_setzero_si256(); }
  PP_INLINE void add(const w64& w, const x4& x) {
    const __m256i ones = _mm256_set1_epi16(1);
    a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)), ones));
    b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b)), ones));
  }
  PP_INLINE vi value(int32_t) const { return {a, b}; }
};
PP_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
#undef PP_INLINE
