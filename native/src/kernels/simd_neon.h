// Sixteen lanes as four NEON registers (ARMv8.2 with dot products). Included in an anonymous namespace.

struct vf {
  float32x4_t v[4];
};
struct vi {
  int32x4_t v[4];
};
#define PP_INLINE inline __attribute__((always_inline))
#define PP_EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

PP_INLINE vf load(const float* p) { vf r; PP_EACH r.v[i] = vld1q_f32(p + 4 * i); return r; }
PP_INLINE void store(float* p, const vf& x) { PP_EACH vst1q_f32(p + 4 * i, x.v[i]); }
PP_INLINE vf set1(float x) { vf r; PP_EACH r.v[i] = vdupq_n_f32(x); return r; }
PP_INLINE vf fma(const vf& x, const vf& y, const vf& z) { vf r; PP_EACH r.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]); return r; }
PP_INLINE vf add(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vaddq_f32(x.v[i], y.v[i]); return r; }
PP_INLINE vf sub(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vsubq_f32(x.v[i], y.v[i]); return r; }
PP_INLINE vf mul(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vmulq_f32(x.v[i], y.v[i]); return r; }
PP_INLINE vf div(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vdivq_f32(x.v[i], y.v[i]); return r; }
// Compare and select, so that a NaN falls on the same side as on x86.
PP_INLINE vf max(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); return r; }
PP_INLINE vf min(const vf& x, const vf& y) { vf r; PP_EACH r.v[i] = vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); return r; }
PP_INLINE vf abs(const vf& x) { vf r; PP_EACH r.v[i] = vabsq_f32(x.v[i]); return r; }
PP_INLINE vf round_even(const vf& x) { vf r; PP_EACH r.v[i] = vrndnq_f32(x.v[i]); return r; }
PP_INLINE vi to_int(const vf& x) { vi r; PP_EACH r.v[i] = vcvtq_s32_f32(x.v[i]); return r; }
PP_INLINE vf to_float(const vi& x) { vf r; PP_EACH r.v[i] = vcvtq_f32_s32(x.v[i]); return r; }
PP_INLINE vf pow2(const vi& n) {
  vf r;
  PP_EACH r.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23));
  return r;
}
PP_INLINE vi iset1(int32_t x) { vi r; PP_EACH r.v[i] = vdupq_n_s32(x); return r; }
PP_INLINE vi iadd(const vi& x, const vi& y) { vi r; PP_EACH r.v[i] = vaddq_s32(x.v[i], y.v[i]); return r; }
PP_INLINE vi isub(const vi& x, const vi& y) { vi r; PP_EACH r.v[i] = vsubq_s32(x.v[i], y.v[i]); return r; }
PP_INLINE vi imul(const vi& x, const vi& y) { vi r; PP_EACH r.v[i] = vmulq_s32(x.v[i], y.v[i]); return r; }
PP_INLINE vf load_half(const uint16_t* p) {
  vf r;
  PP_EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
PP_INLINE void store_half(uint16_t* p, const vf& x) { PP_EACH vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i]))); }
PP_INLINE vf load_bf16(const uint16_t* p) { vf r; PP_EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); return r; }
PP_INLINE vi load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
PP_INLINE vi load_u8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
PP_INLINE void store_i8(int8_t* p, const vi& x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
PP_INLINE void store_i16(int16_t* p, const vi& x) { PP_EACH vst1_s16(p + 4 * i, vqmovn_s32(x.v[i])); }
// Sixteen lanes of two 16-bit numbers, and two numbers for all lanes.
struct vp {
  int16x8_t v[4];
};
using x2 = int16x8_t;
PP_INLINE vp load_pairs(const int8_t* p) { vp r; PP_EACH r.v[i] = vmovl_s8(vld1_s8(p + 8 * i)); return r; }
PP_INLINE x2 broadcast_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return vreinterpretq_s16_s32(vdupq_n_s32(pair));
}
PP_INLINE void add_products(vi& s, const vp& w, const x2& x) {
  PP_EACH {
    const int32x4_t low = vmull_s16(vget_low_s16(w.v[i]), vget_low_s16(x)), high = vmull_high_s16(w.v[i], x);
    s.v[i] = vaddq_s32(s.v[i], vpaddq_s32(low, high));
  }
}
PP_INLINE float sum(const vf& x) {
  const float32x4_t t4 = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t t2 = vadd_f32(vget_low_f32(t4), vget_high_f32(t4));
  return vget_lane_f32(t2, 0) + vget_lane_f32(t2, 1);
}
PP_INLINE int32_t isum(const vi& x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
PP_INLINE float largest(const vf& x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }

struct w64 {
  uint8x16_t v[4];
};
PP_INLINE w64 load_w(const uint8_t* p) { w64 r; PP_EACH r.v[i] = vld1q_u8(p + 16 * i); return r; }
PP_INLINE w64 low_nibbles(const w64& x) { w64 r; PP_EACH r.v[i] = vandq_u8(x.v[i], vdupq_n_u8(15)); return r; }
PP_INLINE w64 high_nibbles(const w64& x) { w64 r; PP_EACH r.v[i] = vshrq_n_u8(x.v[i], 4); return r; }
template <int shift, int count>
PP_INLINE w64 with_high(const w64& base, const w64& high) {
  w64 r;
  const uint8x16_t mask = vdupq_n_u8(((1 << count) - 1) << 4);
  PP_EACH {
    uint8x16_t bits = high.v[i];
    if constexpr (shift < 4) bits = vshlq_n_u8(bits, 4 - shift);
    if constexpr (shift > 4) bits = vshrq_n_u8(bits, shift - 4);
    r.v[i] = vorrq_u8(base.v[i], vandq_u8(bits, mask));
  }
  return r;
}

using x4 = int8x16_t;
PP_INLINE x4 broadcast4(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
// Weights of at most 7 bits are the same signed and unsigned, so the signed dot product serves both.
template <int max_weight, int quads>
struct Dot {
  static_assert(max_weight < 128);
  int32x4_t s[4];
  PP_INLINE void clear() { PP_EACH s[i] = vdupq_n_s32(0); }
  PP_INLINE void start(const w64& w, const x4& x) {
    clear();
    add(w, x);
  }
  PP_INLINE void add(const w64& w, const x4& x) { PP_EACH s[i] = vdotq_s32(s[i], vreinterpretq_s8_u8(w.v[i]), x); }
  PP_INLINE vi value() const { return {{s[0], s[1], s[2], s[3]}}; }
};
struct DotSigned {
  int32x4_t s[4];
  PP_INLINE void clear() { PP_EACH s[i] = vdupq_n_s32(0); }
  PP_INLINE void add(const w64& w, const x4& x) { PP_EACH s[i] = vdotq_s32(s[i], vreinterpretq_s8_u8(w.v[i]), x); }
  PP_INLINE vi value(int32_t) const { return {{s[0], s[1], s[2], s[3]}}; }
};
PP_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
#undef PP_EACH
#undef PP_INLINE
