// Sixteen lanes as one AVX-512 register (F, BW, VL, DQ, VNNI). Included in an anonymous namespace.

struct vf {
  __m512 a;
};
struct vi {
  __m512i a;
};
#define PP_INLINE inline __attribute__((always_inline))

PP_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
PP_INLINE void store(float* p, const vf& x) { _mm512_storeu_ps(p, x.a); }
PP_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
PP_INLINE vf fma(const vf& x, const vf& y, const vf& z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
PP_INLINE vf add(const vf& x, const vf& y) { return {_mm512_add_ps(x.a, y.a)}; }
PP_INLINE vf sub(const vf& x, const vf& y) { return {_mm512_sub_ps(x.a, y.a)}; }
PP_INLINE vf mul(const vf& x, const vf& y) { return {_mm512_mul_ps(x.a, y.a)}; }
PP_INLINE vf div(const vf& x, const vf& y) { return {_mm512_div_ps(x.a, y.a)}; }
PP_INLINE vf max(const vf& x, const vf& y) { return {_mm512_max_ps(x.a, y.a)}; }
PP_INLINE vf min(const vf& x, const vf& y) { return {_mm512_min_ps(x.a, y.a)}; }
PP_INLINE vf abs(const vf& x) { return {_mm512_abs_ps(x.a)}; }
PP_INLINE vf round_even(const vf& x) { return {_mm512_roundscale_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PP_INLINE vi to_int(const vf& x) { return {_mm512_cvttps_epi32(x.a)}; }
PP_INLINE vf to_float(const vi& x) { return {_mm512_cvtepi32_ps(x.a)}; }
PP_INLINE vf pow2(const vi& n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.a, _mm512_set1_epi32(127)), 23))}; }
PP_INLINE vi iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
PP_INLINE vi iadd(const vi& x, const vi& y) { return {_mm512_add_epi32(x.a, y.a)}; }
PP_INLINE vi isub(const vi& x, const vi& y) { return {_mm512_sub_epi32(x.a, y.a)}; }
PP_INLINE vi imul(const vi& x, const vi& y) { return {_mm512_mullo_epi32(x.a, y.a)}; }
PP_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PP_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
PP_INLINE vf load_half(const uint16_t* p) { return {_mm512_cvtph_ps(load256(p))}; }
PP_INLINE void store_half(uint16_t* p, const vf& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
}
PP_INLINE vf load_bf16(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16))}; }
PP_INLINE vi load_i8(const int8_t* p) { return {_mm512_cvtepi8_epi32(load128(p))}; }
PP_INLINE vi load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(load128(p))}; }
PP_INLINE void store_i8(int8_t* p, const vi& x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x.a)); }
PP_INLINE void store_i16(int16_t* p, const vi& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(x.a));
}
// Sixteen lanes of two 16-bit numbers, and two numbers for all lanes.
struct vp {
  __m512i a;
};
using x2 = const int16_t*;
PP_INLINE vp load_pairs(const int8_t* p) { return {_mm512_cvtepi8_epi16(load256(p))}; }
PP_INLINE x2 broadcast_pair(const int16_t* p) { return p; }
// Inline assembly for the reason given below at dpbusd.
PP_INLINE void add_products(vi& s, const vp& w, x2 x) {
  using pair = int32_t __attribute__((aligned(1), may_alias));
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(s.a) : "v"(w.a), "m"(*reinterpret_cast<const pair*>(x)));
}
PP_INLINE float sum(const vf& x) {
  const __m256 t8 = _mm256_add_ps(_mm512_castps512_ps256(x.a), _mm512_extractf32x8_ps(x.a, 1));
  const __m128 t4 = _mm_add_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
  const __m128 t2 = _mm_add_ps(t4, _mm_movehl_ps(t4, t4));
  return _mm_cvtss_f32(_mm_add_ss(t2, _mm_movehdup_ps(t2)));
}
PP_INLINE int32_t isum(const vi& x) {
  const __m256i t8 = _mm256_add_epi32(_mm512_castsi512_si256(x.a), _mm512_maskz_extracti64x4_epi64(0xff, x.a, 1));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(t8), _mm256_extracti128_si256(t8, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
  return _mm_cvtsi128_si32(t);
}
PP_INLINE float largest(const vf& x) { return _mm512_reduce_max_ps(x.a); }

struct w64 {
  __m512i a;
};
PP_INLINE w64 load_w(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
PP_INLINE w64 low_nibbles(const w64& x) { return {_mm512_and_si512(x.a, _mm512_set1_epi8(15))}; }
PP_INLINE w64 high_nibbles(const w64& x) { return {_mm512_and_si512(_mm512_srli_epi16(x.a, 4), _mm512_set1_epi8(15))}; }
template <int shift, int count>
PP_INLINE w64 with_high(const w64& base, const w64& high) {
  const __m512i mask = _mm512_set1_epi8(char(((1 << count) - 1) << 4));
  __m512i bits = high.a;
  if constexpr (shift < 4) bits = _mm512_slli_epi16(bits, 4 - shift);
  if constexpr (shift > 4) bits = _mm512_srli_epi16(bits, shift - 4);
  return {_mm512_or_si512(base.a, _mm512_and_si512(bits, mask))};
}

using x4 = const int8_t*;
PP_INLINE x4 broadcast4(const int8_t* p) { return p; }

// Inline assembly, because GCC 12 copies and spills the accumulators of _mm512_dpbusd_epi32; the
// activations come as a broadcast memory operand.
PP_INLINE void dpbusd(__m512i& s, const __m512i& w, const int8_t* x) {
  using quad = int32_t __attribute__((aligned(1), may_alias));
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s) : "v"(w), "m"(*reinterpret_cast<const quad*>(x)));
}
template <int max_weight, int quads>
struct Dot {
  __m512i s;
  PP_INLINE void clear() { s = _mm512_setzero_si512(); }
  PP_INLINE void start(const w64& w, x4 x) {
    clear();
    add(w, x);
  }
  PP_INLINE void add(const w64& w, x4 x) { dpbusd(s, w.a, x); }
  PP_INLINE vi value() const { return {s}; }
};
// Signed weights become unsigned by adding 128; 128 times the sum of the activations is taken off again.
struct DotSigned {
  __m512i s;
  PP_INLINE void clear() { s = _mm512_setzero_si512(); }
  PP_INLINE void add(const w64& w, x4 x) { dpbusd(s, _mm512_xor_si512(w.a, _mm512_set1_epi8(char(0x80))), x); }
  PP_INLINE vi value(int32_t sum_times_8) const { return {_mm512_sub_epi32(s, _mm512_set1_epi32(16 * sum_times_8))}; }
};
PP_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
#undef PP_INLINE
