#include "pack.h"

#include <cmath>
#include <cstring>

#include "pocketphi.h"

namespace pp {

namespace {

const TypeInfo* find(int type) {
  static const struct {
    int type;
    TypeInfo info;
  } types[] = {
      {PP_F32, {"F32", 1, 4, kPackF32}},          {PP_F16, {"F16", 1, 2, kPackF16}},
      {PP_BF16, {"BF16", 1, 2, kPackBF16}},       {PP_Q8_0, {"Q8_0", 32, 34, kPackQ8}},
      {PP_Q4_0, {"Q4_0", 32, 18, kPackQ4S}},      {PP_Q4_1, {"Q4_1", 32, 20, kPackQ4A}},
      {PP_Q4_K, {"Q4_K", 256, 144, kPackQ4K}},    {PP_Q5_K, {"Q5_K", 256, 176, kPackQ5K}},
      {PP_Q6_K, {"Q6_K", 256, 210, kPackQ6K}},
  };
  for (const auto& entry : types)
    if (entry.type == type) return &entry.info;
  return nullptr;
}

// Bytes of one stretch: header, bytes for every group of 32 columns, groups.
struct Stretch {
  size_t header, group;
  int groups;
};
const Stretch stretches[kNumPacks] = {{0, 0, 0},     {0, 0, 0},     {0, 0, 0},     {0, 1088, 1}, {0, 576, 1},
                                      {0, 640, 1},   {128, 576, 8}, {128, 704, 8}, {64, 832, 8}};

const uint8_t* group_at(int pack, const uint8_t* tile, int g, const uint8_t** header) {
  const Stretch& s = stretches[pack];
  *header = tile + size_t(g / s.groups) * (s.header + s.group * s.groups);
  return *header + s.header + size_t(g % s.groups) * s.group;
}
uint8_t* group_at(int pack, uint8_t* tile, int g, uint8_t** header) {
  const uint8_t* h;
  const uint8_t* p = group_at(pack, static_cast<const uint8_t*>(tile), g, &h);
  *header = const_cast<uint8_t*>(h);
  return const_cast<uint8_t*>(p);
}

uint32_t load32(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
void store32(uint8_t* p, uint32_t v) { memcpy(p, &v, 4); }
uint16_t load16(const uint8_t* p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

constexpr uint32_t kNibbles = 0x0f0f0f0f;

// Place 4-bit values of 32 columns, given as eight words of four, into row r.
void place_nibbles(uint8_t* group, int r, const uint32_t* quads) {
  uint8_t* to = group + 256 * (r / 16) + 4 * (r % 16);
  for (int c = 0; c < 4; ++c) store32(to + 64 * c, quads[2 * c] | (quads[2 * c + 1] << 4));
}

// The 12 bytes of 6-bit scales and minima of Q4_K and Q5_K.
void k_scales(const uint8_t* packed, int g, uint8_t* scale, uint8_t* minimum) {
  if (g < 4) {
    *scale = packed[g] & 63;
    *minimum = packed[g + 4] & 63;
  } else {
    *scale = uint8_t((packed[g + 4] & 15) | ((packed[g - 4] >> 6) << 4));
    *minimum = uint8_t((packed[g + 4] >> 4) | ((packed[g] >> 6) << 4));
  }
}

void pack_same(int type, const uint8_t* row, int cols, uint8_t* tile, int r) {
  const TypeInfo& info = *find(type);
  const int pack = info.pack;
  if (pack == kPackF32) {
    for (int k = 0; k < cols; ++k) memcpy(tile + (size_t(k) * 32 + r) * 4, row + size_t(k) * 4, 4);
    return;
  }
  if (pack == kPackF16 || pack == kPackBF16) {
    for (int k = 0; k < cols; ++k) memcpy(tile + (size_t(k) * 32 + r) * 2, row + size_t(k) * 2, 2);
    return;
  }
  for (int g = 0; g < cols / kGroup; ++g) {
    uint8_t* header;
    uint8_t* group = group_at(pack, tile, g, &header);
    const uint8_t* block = row + size_t(g * kGroup / info.block_weights) * info.block_bytes;
    uint32_t quads[8];
    switch (pack) {
      case kPackQ8: {
        memcpy(group + 1024 + 2 * r, block, 2);
        uint8_t* to = group + 512 * (r / 16) + 4 * (r % 16);
        for (int c = 0; c < 8; ++c) memcpy(to + 64 * c, block + 2 + 4 * c, 4);
        break;
      }
      case kPackQ4S:
      case kPackQ4A: {
        memcpy(group + 512 + 2 * r, block, 2);
        if (pack == kPackQ4A) memcpy(group + 576 + 2 * r, block + 2, 2);
        const uint8_t* q = block + (pack == kPackQ4A ? 4 : 2);
        for (int j = 0; j < 4; ++j) {
          quads[j] = load32(q + 4 * j) & kNibbles;
          quads[j + 4] = (load32(q + 4 * j) >> 4) & kNibbles;
        }
        place_nibbles(group, r, quads);
        break;
      }
      case kPackQ4K:
      case kPackQ5K: {
        const int sub = g % 8;
        if (sub == 0) {
          memcpy(header + 2 * r, block, 2);
          memcpy(header + 64 + 2 * r, block + 2, 2);
        }
        const bool five = pack == kPackQ5K;
        uint8_t* scales = group + (five ? 640 : 512);
        k_scales(block + 4, sub, scales + r, scales + 32 + r);
        const uint8_t* q = block + (five ? 48 : 16) + 32 * (sub / 2);
        for (int j = 0; j < 8; ++j) quads[j] = (load32(q + 4 * j) >> (4 * (sub & 1))) & kNibbles;
        place_nibbles(group, r, quads);
        if (five) {
          uint32_t bits = 0;
          for (int j = 0; j < 8; ++j) bits |= ((load32(block + 16 + 4 * j) >> sub) & 0x01010101u) << j;
          store32(group + 512 + 64 * (r / 16) + 4 * (r % 16), bits);
        }
        break;
      }
      case kPackQ6K: {
        const int sub = g % 8, half = sub / 4, quarter = sub % 4;
        if (sub == 0) memcpy(header + 2 * r, block + 208, 2);
        group[768 + r] = block[192 + 2 * sub];
        group[800 + r] = block[192 + 2 * sub + 1];
        const uint8_t* q = block + 64 * half + 32 * (quarter & 1);
        for (int j = 0; j < 8; ++j) quads[j] = (load32(q + 4 * j) >> (quarter >= 2 ? 4 : 0)) & kNibbles;
        place_nibbles(group, r, quads);
        const uint8_t* high = block + 128 + 32 * half;
        for (int h = 0; h < 2; ++h) {
          uint32_t pairs = 0;
          for (int j = 0; j < 4; ++j)
            pairs |= ((load32(high + 16 * h + 4 * j) >> (2 * quarter)) & 0x03030303u) << (2 * j);
          store32(group + 512 + 128 * (r / 16) + 64 * h + 4 * (r % 16), pairs);
        }
        break;
      }
    }
  }
}

void row_to_float(int type, const uint8_t* row, int cols, float* out) {
  for (int k = 0; k < cols; ++k) {
    if (type == PP_F32) memcpy(out + k, row + size_t(k) * 4, 4);
    else if (type == PP_F16) out[k] = half_to_float(load16(row + size_t(k) * 2));
    else out[k] = bf16_to_float(load16(row + size_t(k) * 2));
  }
}

// Round to nearest into Q8_0 or Q4_0 blocks, as ggml's reference does.
void quantize_row(int type, const float* x, int cols, uint8_t* out) {
  for (int g = 0; g < cols / 32; ++g, x += 32) {
    float most = 0, signed_most = 0;
    for (int i = 0; i < 32; ++i) {
      const float a = std::fabs(x[i]);
      if (a > most) most = a, signed_most = x[i];
    }
    const float d = type == PP_Q8_0 ? most / 127.0f : signed_most / -8.0f;
    const float inverse = d != 0 ? 1.0f / d : 0.0f;
    const uint16_t half = float_to_half(d);
    memcpy(out, &half, 2);
    if (type == PP_Q8_0) {
      for (int i = 0; i < 32; ++i) out[2 + i] = uint8_t(int8_t(std::round(x[i] * inverse)));
      out += 34;
    } else {
      for (int i = 0; i < 16; ++i) {
        const int a = int(x[i] * inverse + 8.5f), b = int(x[i + 16] * inverse + 8.5f);
        out[2 + i] = uint8_t((a > 15 ? 15 : a) | ((b > 15 ? 15 : b) << 4));
      }
      out += 18;
    }
  }
}

// 32 columns of one row of a tile, in the arithmetic of the formats' reference.
void unpack_row_group(int pack, const uint8_t* tile, int g, int r, float* out) {
  const uint8_t* header;
  const uint8_t* group = group_at(pack, tile, g, &header);
  if (pack == kPackQ8) {
    const float d = half_to_float(load16(group + 1024 + 2 * r));
    const uint8_t* q = group + 512 * (r / 16) + 4 * (r % 16);
    for (int k = 0; k < 32; ++k) out[k] = d * float(int8_t(q[64 * (k / 4) + k % 4]));
    return;
  }
  uint8_t q[32];
  const uint8_t* nibbles = group + 256 * (r / 16) + 4 * (r % 16);
  for (int k = 0; k < 32; ++k) {
    const uint8_t byte = nibbles[64 * (k / 8) + k % 4];
    q[k] = k % 8 < 4 ? byte & 15 : byte >> 4;
  }
  switch (pack) {
    case kPackQ4S: {
      const float d = half_to_float(load16(group + 512 + 2 * r));
      for (int k = 0; k < 32; ++k) out[k] = d * (float(q[k]) - 8.0f);
      break;
    }
    case kPackQ4A: {
      const float d = half_to_float(load16(group + 512 + 2 * r)), m = half_to_float(load16(group + 576 + 2 * r));
      for (int k = 0; k < 32; ++k) out[k] = d * float(q[k]) + m;
      break;
    }
    case kPackQ5K: {
      const uint8_t* fifth = group + 512 + 64 * (r / 16) + 4 * (r % 16);
      for (int k = 0; k < 32; ++k) q[k] = uint8_t(q[k] | (((fifth[k % 4] >> (k / 4)) & 1) << 4));
      [[fallthrough]];
    }
    case kPackQ4K: {
      const uint8_t* scales = group + (pack == kPackQ5K ? 640 : 512);
      const float d = half_to_float(load16(header + 2 * r)) * float(scales[r]);
      const float m = half_to_float(load16(header + 64 + 2 * r)) * float(scales[32 + r]);
      for (int k = 0; k < 32; ++k) out[k] = d * float(q[k]) - m;
      break;
    }
    case kPackQ6K: {
      const uint8_t* pairs = group + 512 + 128 * (r / 16) + 4 * (r % 16);
      const float d = half_to_float(load16(header + 2 * r));
      for (int k = 0; k < 32; ++k) {
        const int h = k / 16, high = (pairs[64 * h + k % 4] >> (2 * (k % 16 / 4))) & 3;
        const float scale = d * float(int8_t(group[768 + 32 * h + r]));
        out[k] = scale * (float(q[k] | (high << 4)) - 32.0f);
      }
      break;
    }
  }
}

}  // namespace

const TypeInfo* type_info(int type) { return find(type); }
bool is_float_type(int type) { return type == PP_F32 || type == PP_F16 || type == PP_BF16; }

size_t tile_bytes(int pack, int cols) {
  if (pack == kPackF32) return size_t(cols) * kTileRows * 4;
  if (pack == kPackF16 || pack == kPackBF16) return size_t(cols) * kTileRows * 2;
  const Stretch& s = stretches[pack];
  return size_t(cols / (kGroup * s.groups)) * (s.header + s.group * s.groups);
}

int pack_columns(int pack) { return pack <= kPackBF16 ? 1 : kGroup * stretches[pack].groups; }

double pack_bits_per_weight(int pack) { return 8.0 * double(tile_bytes(pack, 256)) / (256.0 * kTileRows); }

bool Matrix::allocate(int pack_, int rows_, int cols_, bool paired_) {
  pack = pack_;
  rows = rows_;
  cols = cols_;
  paired = paired_;
  if (!tiles.allocate(size_t(num_tiles()) * bytes_of_tile(), true)) {
    pack = -1;
    return false;
  }
  return true;
}

bool can_store(int type, int store_type) {
  if (type == store_type) return true;
  return is_float_type(type) && (store_type == PP_Q8_0 || store_type == PP_Q4_0);
}

void pack_row(int type, int store_type, const uint8_t* row, int cols, uint8_t* tile, int r, uint8_t* scratch) {
  if (type == store_type) return pack_same(type, row, cols, tile, r);
  auto* floats = reinterpret_cast<float*>(scratch);
  uint8_t* blocks = scratch + size_t(cols) * 4;
  row_to_float(type, row, cols, floats);
  quantize_row(store_type, floats, cols, blocks);
  pack_same(store_type, blocks, cols, tile, r);
}

void unpack_row(const Matrix& matrix, int row, float* out) {
  const uint8_t* tile = matrix.tile(row / kTileRows);
  const int r = row % kTileRows;
  if (matrix.pack > kPackBF16) {
    for (int g = 0; g < matrix.cols / kGroup; ++g) unpack_row_group(matrix.pack, tile, g, r, out + size_t(g) * kGroup);
    return;
  }
  for (int k = 0; k < matrix.cols; ++k) {
    const size_t at = size_t(k) * kTileRows + r;
    if (matrix.pack == kPackF32) memcpy(out + k, tile + at * 4, 4);
    else if (matrix.pack == kPackF16) out[k] = half_to_float(load16(tile + at * 2));
    else out[k] = bf16_to_float(load16(tile + at * 2));
  }
}

void unpack_group(int pack, const uint8_t* tile, int group, int, float* out) {
  float row[kGroup];
  for (int r = 0; r < kTileRows; ++r) {
    unpack_row_group(pack, tile, group, r, row);
    for (int k = 0; k < kGroup; ++k) out[k * kTileRows + r] = row[k];
  }
}

}  // namespace pp
