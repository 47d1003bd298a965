// Sessions: the cache of one sequence, cut, turned, saved and restored.

#include <cmath>
#include <cstring>

#include "model.h"

namespace pp {
namespace {

constexpr char kMagic[8] = {'P', 'P', 'S', 'T', 'A', 'T', 'E', '2'};

struct Header {
  char magic[8];
  int32_t layers, kv_heads, head_dim, cache_type, length, rope_set;
  uint64_t checksum;  // of everything after the header, and of the fields above
};

// FNV-1a over 8 bytes at a time: finds damage, is no defence against an attacker (nor need it be: every
// value in a state is a number that any byte pattern makes valid).
uint64_t checksum(const void* data, size_t bytes, uint64_t hash) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    hash = (hash ^ word) * 0x100000001b3ull;
    hash ^= hash >> 29;
  }
  for (; bytes; --bytes, ++p) hash = (hash ^ *p) * 0x100000001b3ull;
  return hash;
}

bool rope_exists(const pp_model& m, int set) {
  if (set >= 0 && set < 3 && !m.inv_freq[set].empty()) return true;
  return fail("this model has no rope factor set %d", set);
}

size_t position_bytes(const pp_model& m) {
  const size_t element = m.cache_type == PP_CACHE_F32 ? 4 : m.cache_type == PP_CACHE_F16 ? 2 : 1;
  return 2 * size_t(m.config.head_dim) * element + (m.cache_type == PP_CACHE_Q8 ? 8 : 0);
}

// Copy one position of one head to (`out`) or from the cache: key, value, scales.
template <class T>
void copy_position(const pp_model& m, uint8_t* unit, int p, uint8_t* bytes, bool out) {
  const int dim = m.config.head_dim, padded = m.padded_dim;
  constexpr bool pairs = sizeof(T) == 1;
  auto* keys = reinterpret_cast<T*>(unit);
  auto* values = reinterpret_cast<T*>(unit + m.key_bytes);
  for (int d = 0; d < dim; ++d) {
    uint8_t *key = bytes + size_t(d) * sizeof(T), *value = bytes + size_t(dim + d) * sizeof(T);
    T* k = keys + key_index(pairs, padded, p, d);
    T* v = values + value_index(pairs, padded, p, d);
    memcpy(out ? static_cast<void*>(key) : k, out ? static_cast<void*>(k) : key, sizeof(T));
    memcpy(out ? static_cast<void*>(value) : v, out ? static_cast<void*>(v) : value, sizeof(T));
  }
  if (m.cache_type != PP_CACHE_Q8) return;
  auto* scales = reinterpret_cast<float*>(unit + 2 * m.key_bytes);
  uint8_t* saved_scales = bytes + 2 * size_t(dim) * sizeof(T);
  for (int i = 0; i < 2; ++i) {
    if (out) memcpy(saved_scales + 4 * i, scales + i * kChunk + p, 4);
    else memcpy(scales + i * kChunk + p, saved_scales + 4 * i, 4);
  }
}

void copy_all(const pp_session& s, uint8_t* bytes, bool out) {
  const pp_model& m = *s.model;
  const size_t step = position_bytes(m);
  for (int layer = 0; layer < m.config.num_layers; ++layer)
    for (int head = 0; head < m.config.num_kv_heads; ++head)
      for (int position = 0; position < s.length; ++position, bytes += step) {
        uint8_t* unit = s.keys(layer, position / kChunk, head);
        const int p = position % kChunk;
        if (m.cache_type == PP_CACHE_F32) copy_position<float>(m, unit, p, bytes, out);
        else if (m.cache_type == PP_CACHE_F16) copy_position<uint16_t>(m, unit, p, bytes, out);
        else copy_position<int8_t>(m, unit, p, bytes, out);
      }
}

}  // namespace
}  // namespace pp

using namespace pp;

extern "C" {

pp_session* pp_session_new(pp_model* model, int32_t capacity, int32_t rope_set) {
  if (!model || !model->finished) {
    fail("the model is not complete");
    return nullptr;
  }
  if (capacity < 1 || capacity > model->config.max_positions) {
    fail("a session of %d tokens; this model has positions for 1 to %d", capacity, model->config.max_positions);
    return nullptr;
  }
  if (!rope_exists(*model, rope_set)) return nullptr;
  auto* session = new pp_session;
  session->model = model;
  session->capacity = capacity;
  session->rope_set = rope_set;
  session->num_chunks = (capacity + kChunk - 1) / kChunk;
  const size_t bytes = size_t(model->config.num_layers) * size_t(session->num_chunks) *
                       size_t(model->config.num_kv_heads) * model->unit_bytes;
  if (!session->cache.allocate(bytes, true)) {
    delete session;
    return nullptr;
  }
  return session;
}

void pp_session_free(pp_session* session) { delete session; }

int32_t pp_session_length(const pp_session* session) { return session ? session->length : 0; }

int pp_session_truncate(pp_session* session, int32_t length) {
  if (!session || length < 0 || length > session->length) {
    fail("cannot cut a session of %d tokens to %d", session ? session->length : 0, length);
    return 1;
  }
  session->length = length;
  return 0;
}

int pp_session_reset(pp_session* session, int32_t rope_set) {
  if (!session || !rope_exists(*session->model, rope_set)) return 1;
  session->length = 0;
  session->rope_set = rope_set;
  return 0;
}

int pp_session_rotate(pp_session* session, int32_t rope_set) {
  if (!session || !rope_exists(*session->model, rope_set)) return 1;
  pp_model& m = *session->model;
  if (rope_set == session->rope_set) return 0;
  const int dim = m.config.head_dim, half = dim / 2;
  const float ratio = m.config.rope_magnitude[rope_set] / m.config.rope_magnitude[session->rope_set];
  const auto& from = m.inv_freq[session->rope_set];
  const auto& to = m.inv_freq[rope_set];
  m.threads.run(m.config.num_layers, [&](int layer, int) {
    std::vector<float> key(size_t(round_up(size_t(dim), 16)) + 16), value(key.size()), cosines(key.size()), sines(key.size());
    for (int position = 0; position < session->length; ++position) {
      for (int i = 0; i < half; ++i) {
        const double angle = double(position) * (double(to[size_t(i)]) - double(from[size_t(i)]));
        cosines[size_t(i)] = float(std::cos(angle) * double(ratio));
        sines[size_t(i)] = float(std::sin(angle) * double(ratio));
      }
      for (int head = 0; head < m.config.num_kv_heads; ++head) {
        uint8_t* unit = session->keys(layer, position / kChunk, head);
        const int p = position % kChunk;
        const bool pairs = m.cache_type == PP_CACHE_Q8;
        auto* scales = reinterpret_cast<float*>(unit + 2 * m.key_bytes);
        for (int d = 0; d < dim; ++d) {
          const size_t k = key_index(pairs, m.padded_dim, p, d), v = value_index(pairs, m.padded_dim, p, d);
          if (m.cache_type == PP_CACHE_F32) {
            key[size_t(d)] = reinterpret_cast<float*>(unit)[k];
            value[size_t(d)] = reinterpret_cast<float*>(unit + m.key_bytes)[v];
          } else if (m.cache_type == PP_CACHE_F16) {
            key[size_t(d)] = half_to_float(reinterpret_cast<uint16_t*>(unit)[k]);
            value[size_t(d)] = half_to_float(reinterpret_cast<uint16_t*>(unit + m.key_bytes)[v]);
          } else {
            key[size_t(d)] = float(reinterpret_cast<int8_t*>(unit)[k]) * scales[p];
            value[size_t(d)] = float(reinterpret_cast<int8_t*>(unit + m.key_bytes)[v]) * scales[kChunk + p];
          }
        }
        m.kernels->rope(key.data(), cosines.data(), sines.data(), dim, m.config.rope_interleaved != 0);
        m.kernels->store_kv(m.cache_type, key.data(), value.data(), dim, m.padded_dim, p, unit, unit + m.key_bytes,
                            scales, scales + kChunk);
      }
    }
  });
  session->rope_set = rope_set;
  return 0;
}

int64_t pp_session_save_size(const pp_session* session) {
  if (!session) return 0;
  const pp_model& m = *session->model;
  return int64_t(sizeof(Header) + size_t(m.config.num_layers) * m.config.num_kv_heads * size_t(session->length) *
                                      position_bytes(m));
}

int pp_session_save(const pp_session* session, void* data, size_t num_bytes) {
  if (!session || !data || int64_t(num_bytes) != pp_session_save_size(session)) {
    fail("the buffer for a saved session has the wrong size");
    return 1;
  }
  const pp_config& c = session->model->config;
  Header header = {};
  memcpy(header.magic, kMagic, 8);
  header.layers = c.num_layers;
  header.kv_heads = c.num_kv_heads;
  header.head_dim = c.head_dim;
  header.cache_type = session->model->cache_type;
  header.length = session->length;
  header.rope_set = session->rope_set;
  auto* bytes = static_cast<uint8_t*>(data) + sizeof header;
  copy_all(*session, bytes, true);
  header.checksum = checksum(bytes, num_bytes - sizeof header, checksum(&header, offsetof(Header, checksum), 1469598103934665603ull));
  memcpy(data, &header, sizeof header);
  return 0;
}

pp_session* pp_session_restore(pp_model* model, const void* data, size_t num_bytes, int32_t capacity) {
  Header header;
  if (!model || !data || num_bytes < sizeof header) {
    fail("the saved session is too short (%zu bytes)", num_bytes);
    return nullptr;
  }
  memcpy(&header, data, sizeof header);
  const pp_config& c = model->config;
  if (memcmp(header.magic, kMagic, 8) != 0) {
    fail("not a saved session of this engine");
    return nullptr;
  }
  if (header.layers != c.num_layers || header.kv_heads != c.num_kv_heads || header.head_dim != c.head_dim ||
      header.cache_type != model->cache_type) {
    fail("the saved session is of a model or cache type with another shape");
    return nullptr;
  }
  if (header.length < 0 || header.length > capacity) {
    fail("the saved session has %d tokens, the capacity is %d", header.length, capacity);
    return nullptr;
  }
  const auto* bytes = static_cast<const uint8_t*>(data) + sizeof header;
  const size_t expected = size_t(c.num_layers) * c.num_kv_heads * size_t(header.length) * position_bytes(*model);
  if (num_bytes - sizeof header != expected) {
    fail("the saved session has %zu bytes, %zu were expected", num_bytes, expected + sizeof header);
    return nullptr;
  }
  if (checksum(bytes, expected, checksum(&header, offsetof(Header, checksum), 1469598103934665603ull)) != header.checksum) {
    fail("the saved session is damaged: its checksum does not match");
    return nullptr;
  }
  pp_session* session = pp_session_new(model, capacity, header.rope_set);
  if (!session) return nullptr;
  session->length = header.length;
  copy_all(*session, const_cast<uint8_t*>(bytes), false);
  return session;
}

}  // extern "C"
