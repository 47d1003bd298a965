// Sixteen lanes in plain C++: the reference that every other instruction set must match bit for bit.
// Included inside the anonymous namespace of a kernel file.

struct vf {
  float v[16];
};
struct vi {
  int32_t v[16];
};

#define PP_EACH for (int i = 0; i < 16; ++i)

inline vf load(const float* p) { vf r; PP_EACH r.v[i] = p[i]; return r; }
inline void store(float* p, const vf& a) { PP_EACH p[i] = a.v[i]; }
inline vf set1(float x) { vf r; PP_EACH r.v[i] = x; return r; }
inline vf fma(const vf& a, const vf& b, const vf& c) { vf r; PP_EACH r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]); return r; }
inline vf add(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
inline vf sub(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] - b.v[i]; return r; }
inline vf mul(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
inline vf div(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] / b.v[i]; return r; }
// As the x86 instructions: the second operand when the comparison is false.
inline vf max(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
inline vf min(const vf& a, const vf& b) { vf r; PP_EACH r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
inline vf abs(const vf& a) { vf r; PP_EACH r.v[i] = __builtin_fabsf(a.v[i]); return r; }
inline vf round_even(const vf& a) { vf r; PP_EACH r.v[i] = __builtin_rintf(a.v[i]); return r; }
inline vi to_int(const vf& a) { vi r; PP_EACH r.v[i] = int32_t(a.v[i]); return r; }
inline vf to_float(const vi& a) { vf r; PP_EACH r.v[i] = float(a.v[i]); return r; }
inline vf pow2(const vi& n) {
  vf r;
  PP_EACH { const int32_t bits = (n.v[i] + 127) << 23; __builtin_memcpy(&r.v[i], &bits, 4); }
  return r;
}
inline vi iset1(int32_t x) { vi r; PP_EACH r.v[i] = x; return r; }
inline vi iadd(const vi& a, const vi& b) { vi r; PP_EACH r.v[i] = a.v[i] + b.v[i]; return r; }
inline vi isub(const vi& a, const vi& b) { vi r; PP_EACH r.v[i] = a.v[i] - b.v[i]; return r; }
inline vi imul(const vi& a, const vi& b) { vi r; PP_EACH r.v[i] = a.v[i] * b.v[i]; return r; }
inline vf load_half(const uint16_t* p) { vf r; PP_EACH r.v[i] = half_to_float(p[i]); return r; }
inline void store_half(uint16_t* p, const vf& a) { PP_EACH p[i] = float_to_half(a.v[i]); }
inline vf load_bf16(const uint16_t* p) { vf r; PP_EACH r.v[i] = bf16_to_float(p[i]); return r; }
inline vi load_i8(const int8_t* p) { vi r; PP_EACH r.v[i] = p[i]; return r; }
inline vi load_u8(const uint8_t* p) { vi r; PP_EACH r.v[i] = p[i]; return r; }
inline void store_i8(int8_t* p, const vi& a) { PP_EACH p[i] = int8_t(a.v[i]); }
inline void store_i16(int16_t* p, const vi& a) { PP_EACH { const int16_t v = int16_t(a.v[i]); __builtin_memcpy(p + i, &v, 2); } }
// Sixteen lanes of two 16-bit numbers, and two numbers for all lanes.
struct vp {
  int16_t v[32];
};
struct x2 {
  int16_t v[2];
};
inline vp load_pairs(const int8_t* p) { vp r; for (int i = 0; i < 32; ++i) r.v[i] = p[i]; return r; }
inline x2 broadcast_pair(const int16_t* p) { x2 r; __builtin_memcpy(r.v, p, 4); return r; }
inline void add_products(vi& s, const vp& w, const x2& x) {
  PP_EACH s.v[i] += int32_t(w.v[2 * i]) * x.v[0] + int32_t(w.v[2 * i + 1]) * x.v[1];
}
inline float sum(const vf& a) {
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) t[i] = t[i] + t[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
}
inline int32_t isum(const vi& a) { int32_t t = 0; PP_EACH t += a.v[i]; return t; }
inline float largest(const vf& a) {
  float t = a.v[0];
  for (int i = 1; i < 16; ++i) t = a.v[i] > t ? a.v[i] : t;
  return t;
}

// 64 bytes: 4 consecutive weights of each of 16 rows.
struct w64 {
  uint8_t v[64];
};
inline w64 load_w(const uint8_t* p) { w64 r; __builtin_memcpy(r.v, p, 64); return r; }
inline w64 low_nibbles(const w64& a) { w64 r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] & 15; return r; }
inline w64 high_nibbles(const w64& a) { w64 r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] >> 4; return r; }
// base | (bits `shift`.. of `high`, `count` of them) << 4
template <int shift, int count>
inline w64 with_high(const w64& base, const w64& high) {
  w64 r;
  for (int i = 0; i < 64; ++i) r.v[i] = uint8_t(base.v[i] | (((high.v[i] >> shift) & ((1 << count) - 1)) << 4));
  return r;
}

struct x4 {
  int8_t v[4];
};
inline x4 broadcast4(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }

// Sums of products of 4 weights with 4 activations for 16 rows; `max_weight` bounds the unsigned weights
// so that an instruction set may accumulate in 16 bits between `quads` additions.
template <int max_weight, int quads>
struct Dot {
  vi s;
  void clear() { PP_EACH s.v[i] = 0; }
  void start(const w64& w, const x4& x) {
    clear();
    add(w, x);
  }
  void add(const w64& w, const x4& x) {
    PP_EACH for (int k = 0; k < 4; ++k) s.v[i] += int32_t(w.v[4 * i + k]) * x.v[k];
  }
  vi value() const { return s; }
};
struct DotSigned {
  vi s;
  void clear() { PP_EACH s.v[i] = 0; }
  void add(const w64& w, const x4& x) {
    PP_EACH for (int k = 0; k < 4; ++k) s.v[i] += int32_t(int8_t(w.v[4 * i + k])) * x.v[k];
  }
  vi value(int32_t) const { return s; }
};
inline void prefetch(const void*) {}
#undef PP_EACH
