// Loading: the shape is checked, tensors are packed one by one.

#include "model.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>

namespace pp {

namespace {

constexpr int64_t kMaxSize = 1 << 24;  // rows or columns; far above any real model

bool check_size(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return true;
  return fail("%s is %lld, outside %lld..%lld", what, (long long)value, (long long)low, (long long)high);
}

bool allocate_vector(Pages& pages, int type, int64_t rows, int64_t cols, const void* data, int64_t expected,
                     const char* name) {
  if (type != PP_F32 && type != PP_F16 && type != PP_BF16)
    return fail("tensor '%s' must be F32, F16 or BF16, found type %d", name, type);
  if (rows != 1 || cols != expected)
    return fail("tensor '%s' has shape [%lld, %lld], expected [1, %lld]", name, (long long)rows, (long long)cols,
                (long long)expected);
  if (!pages.allocate(size_t(round_up(size_t(cols), 16)) * 4, false)) return false;
  float* out = pages.as<float>();
  const auto* bytes = static_cast<const uint8_t*>(data);
  for (int64_t i = 0; i < cols; ++i) {
    if (type == PP_F32) {
      memcpy(out + i, bytes + 4 * i, 4);
    } else {
      uint16_t half;
      memcpy(&half, bytes + 2 * i, 2);
      out[i] = type == PP_F16 ? half_to_float(half) : bf16_to_float(half);
    }
    if (!(out[i] - out[i] == 0.0f)) return fail("tensor '%s' holds values that are not finite", name);
  }
  return true;
}

// Half-precision scales that are infinite or NaN would make every logit NaN; say which tensor it is.
bool finite_scales(const char* name, int type, const uint8_t* row, int64_t cols) {
  const TypeInfo& info = *type_info(type);
  const auto half_ok = [](const uint8_t* p) { return (((uint32_t(p[1]) << 8 | p[0]) >> 10) & 31) != 31; };
  for (int64_t b = 0; b < cols / info.block_weights; ++b, row += info.block_bytes) {
    bool good = true;
    switch (type) {
      case PP_F16: good = half_ok(row); break;
      case PP_BF16: good = ((uint32_t(row[1]) << 8 | row[0]) & 0x7f80) != 0x7f80; break;
      case PP_F32: good = ((uint32_t(row[3]) << 8 | row[2]) & 0x7f80) != 0x7f80; break;
      case PP_Q4_0:
      case PP_Q8_0: good = half_ok(row); break;
      case PP_Q4_1:
      case PP_Q4_K:
      case PP_Q5_K: good = half_ok(row) && half_ok(row + 2); break;
      case PP_Q6_K: good = half_ok(row + 208); break;
    }
    if (!good) return fail("tensor '%s' holds values that are not finite", name);
  }
  return true;
}

struct Source {
  const char* name;
  int type, store_type;
  int64_t rows, cols;
  const uint8_t* data;
  size_t row_bytes;
};

// Pack source rows [from, from + count) as rows of `matrix`; for a paired matrix into its `half`.
bool pack_rows(pp_model& model, Matrix& matrix, const Source& source, int64_t from, int count, int half) {
  const int width = matrix.width();
  std::vector<char> failed(size_t(model.threads.count()), 0);
  const int tiles = (count + width - 1) / width;
  const size_t scratch_bytes = size_t(source.cols) * 8 + 64;
  Pages scratch;
  if (!scratch.allocate(scratch_bytes * failed.size(), false)) return false;
  char first_message[256] = "";
  std::atomic<bool> said{false};
  model.threads.run(tiles, [&](int t, int thread) {
    uint8_t* tile = matrix.tiles.data() + size_t(t) * matrix.bytes_of_tile();
    for (int i = 0; i < width && t * width + i < count; ++i) {
      const uint8_t* row = source.data + size_t(from + t * width + i) * source.row_bytes;
      if (!finite_scales(source.name, source.type, row, source.cols)) {
        if (!said.exchange(true)) snprintf(first_message, sizeof first_message, "%s", last_error());
        return;
      }
      pack_row(source.type, source.store_type, row, int(source.cols), tile, i + 16 * half,
               scratch.data() + scratch_bytes * size_t(thread));
    }
  });
  return said ? fail("%s", first_message) : true;
}

bool load_matrix(pp_model& model, Matrix& matrix, const Source& source, int64_t rows, int64_t cols) {
  if (source.rows != rows || source.cols != cols)
    return fail("tensor '%s' has shape [%lld, %lld], expected [%lld, %lld]", source.name, (long long)source.rows,
                (long long)source.cols, (long long)rows, (long long)cols);
  if (!matrix.empty()) return fail("tensor '%s' is given twice", source.name);
  if (!matrix.allocate(type_info(source.store_type)->pack, int(rows), int(cols), false)) return false;
  return pack_rows(model, matrix, source, 0, int(rows), 0);
}

// gate and up share tiles. `halves` 1: this is one of the two; 2: both, gate rows first.
bool load_gate_up(pp_model& model, Layer& layer, const Source& source, bool is_gate) {
  const pp_config& c = model.config;
  const bool fused = !is_gate && source.rows == 2 * int64_t(c.intermediate_size) && c.intermediate_size > 0;
  const int64_t rows = fused ? 2 * int64_t(c.intermediate_size) : c.intermediate_size;
  if (source.rows != rows || source.cols != c.hidden_size)
    return fail("tensor '%s' has shape [%lld, %lld], expected [%lld or twice that, %d]", source.name,
                (long long)source.rows, (long long)source.cols, (long long)c.intermediate_size, c.hidden_size);
  if ((is_gate && layer.have_gate) || (!is_gate && layer.have_up) || (fused && layer.have_gate))
    return fail("tensor '%s' is given twice", source.name);
  const int pack = type_info(source.store_type)->pack;
  if (layer.gate_up.empty()) {
    if (!layer.gate_up.allocate(pack, c.intermediate_size, c.hidden_size, true)) return false;
  } else if (layer.gate_up.pack != pack) {
    return fail("tensor '%s': gate and up projections of one layer must have the same type", source.name);
  }
  if (fused) {
    layer.have_gate = layer.have_up = true;
    return pack_rows(model, layer.gate_up, source, 0, c.intermediate_size, 0) &&
           pack_rows(model, layer.gate_up, source, c.intermediate_size, c.intermediate_size, 1);
  }
  (is_gate ? layer.have_gate : layer.have_up) = true;
  return pack_rows(model, layer.gate_up, source, 0, c.intermediate_size, is_gate ? 0 : 1);
}

}  // namespace

bool model_init(pp_model& model, const pp_config& config, const pp_options* options) {
  model.config = config;
  const pp_config& c = model.config;
  if (!check_size("vocab_size", c.vocab_size, 1, kMaxSize) || !check_size("hidden_size", c.hidden_size, 1, 1 << 20) ||
      !check_size("intermediate_size", c.intermediate_size, 1, 1 << 20) ||
      !check_size("num_layers", c.num_layers, 1, 4096) || !check_size("num_heads", c.num_heads, 1, 4096) ||
      !check_size("num_kv_heads", c.num_kv_heads, 1, c.num_heads) || !check_size("head_dim", c.head_dim, 2, 1024) ||
      !check_size("window", c.window, 0, 1 << 30) || !check_size("max_positions", c.max_positions, 1, 1 << 30))
    return false;
  if (c.head_dim % 2) return fail("head_dim %d is odd", c.head_dim);
  if (c.num_heads % c.num_kv_heads)
    return fail("num_heads %d is not a multiple of num_kv_heads %d", c.num_heads, c.num_kv_heads);
  const int share = c.num_heads / c.num_kv_heads;
  if (share > kMaxQueries) return fail("%d query heads for one key head; at most %d", share, kMaxQueries);
  if (!(c.rms_norm_eps >= 0.0f && c.rms_norm_eps < 1.0f)) return fail("rms_norm_eps %g", double(c.rms_norm_eps));
  bool any = false;
  for (int set = 0; set < 3; ++set) {
    if (!config.inv_freq[set]) continue;
    any = true;
    model.inv_freq[set].assign(config.inv_freq[set], config.inv_freq[set] + c.head_dim / 2);
    for (const float f : model.inv_freq[set])
      if (!(f - f == 0.0f)) return fail("rope frequencies are not finite");
    model.config.inv_freq[set] = model.inv_freq[set].data();
  }
  if (!any) return fail("no rope factor set is given");
  static const pp_options defaults = {0, PP_CACHE_F16, 0, PP_ACTIVATIONS_INT8, 0, nullptr};
  const pp_options& o = options ? *options : defaults;
  if (o.cache_type < 0 || o.cache_type > PP_CACHE_Q8) return fail("unknown cache type %d", o.cache_type);
  model.cache_type = o.cache_type;
  if (!check_size("max_batch_tokens", o.max_batch_tokens, 0, 1 << 16)) return false;
  model.max_batch_tokens = o.max_batch_tokens ? o.max_batch_tokens : 256;
  if (o.activations < 0 || o.activations > PP_ACTIVATIONS_INT16) return fail("unknown activations %d", o.activations);
  model.float_activations = o.activations == PP_ACTIVATIONS_F32;
  model.places = o.activations == PP_ACTIVATIONS_INT16 ? 2 : 1;
  model.kernels = select_kernels(o.kernels);
  if (!model.kernels) return false;
  if (!check_size("num_threads", o.num_threads, 0, 256)) return false;
  if (!model.threads.start(o.num_threads ? o.num_threads : Threads::available(), o.pin_threads != 0)) return false;
  model.layers.resize(size_t(c.num_layers));
  model.padded_dim = int(round_up(size_t(c.head_dim), 16));
  const size_t element = model.cache_type == PP_CACHE_F32 ? 4 : model.cache_type == PP_CACHE_F16 ? 2 : 1;
  model.key_bytes = size_t(kChunk) * model.padded_dim * element;
  model.unit_bytes = 2 * model.key_bytes + (model.cache_type == PP_CACHE_Q8 ? 2 * kChunk * sizeof(float) : 0);
  model.max_query_tokens = share >= kMaxQueries ? 1 : kMaxQueries / share;
  return true;
}

bool model_set_tensor(pp_model& model, const char* name, int type, int64_t rows, int64_t cols, const void* data,
                      size_t num_bytes, int store_type, bool discard) {
  const pp_config& c = model.config;
  if (model.finished) return fail("the model is complete; tensor '%s' comes too late", name);
  const TypeInfo* info = type_info(type);
  if (!info) return fail("tensor '%s' has the unsupported type %d", name, type);
  if (!type_info(store_type) || !can_store(type, store_type))
    return fail("tensor '%s' of type %s cannot be stored as type %d", name, info->name, store_type);
  if (!check_size(name, rows, 1, kMaxSize) || !check_size(name, cols, 1, kMaxSize)) return false;
  if (cols % info->block_weights)
    return fail("rows of tensor '%s' have %lld numbers, not a multiple of %s's block of %d", name, (long long)cols,
                info->name, info->block_weights);
  if (cols % pack_columns(type_info(store_type)->pack))
    return fail("rows of tensor '%s' have %lld numbers, which %s cannot hold", name, (long long)cols,
                type_info(store_type)->name);
  const size_t row_bytes = size_t(cols) / size_t(info->block_weights) * size_t(info->block_bytes);
  if (num_bytes != row_bytes * size_t(rows))
    return fail("tensor '%s' has %zu bytes, its shape needs %zu", name, num_bytes, row_bytes * size_t(rows));
  const Source source{name, type, store_type, rows, cols, static_cast<const uint8_t*>(data), row_bytes};

  bool good;
  int index = -1, used = 0;
  char rest[64] = "";
  const int width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  if (strcmp(name, "token_embd.weight") == 0) {
    good = load_matrix(model, model.embed, source, c.vocab_size, c.hidden_size);
  } else if (strcmp(name, "output.weight") == 0) {
    good = c.tied_head ? fail("tensor 'output.weight' is given, but the head is tied to the embedding")
                       : load_matrix(model, model.head, source, c.vocab_size, c.hidden_size);
  } else if (strcmp(name, "output_norm.weight") == 0) {
    good = allocate_vector(model.norm, type, rows, cols, data, c.hidden_size, name);
  } else if (sscanf(name, "blk.%d.%63s%n", &index, rest, &used) == 2 && name[used] == 0 && index >= 0 &&
             index < c.num_layers) {
    Layer& layer = model.layers[size_t(index)];
    if (strcmp(rest, "attn_norm.weight") == 0) {
      good = allocate_vector(layer.attention_norm, type, rows, cols, data, c.hidden_size, name);
    } else if (strcmp(rest, "ffn_norm.weight") == 0) {
      good = allocate_vector(layer.mlp_norm, type, rows, cols, data, c.hidden_size, name);
    } else if (strcmp(rest, "attn_qkv.weight") == 0) {
      if (layer.qkv_parts) return fail("tensor '%s' is given beside separate q, k or v", name);
      layer.qkv_parts = 1;
      good = load_matrix(model, layer.qkv[0], source, model.qkv_rows(), c.hidden_size);
    } else if (strcmp(rest, "attn_q.weight") == 0 || strcmp(rest, "attn_k.weight") == 0 ||
               strcmp(rest, "attn_v.weight") == 0) {
      if (layer.qkv_parts == 1) return fail("tensor '%s' is given beside a fused attn_qkv", name);
      layer.qkv_parts = 3;
      const int part = rest[5] == 'q' ? 0 : rest[5] == 'k' ? 1 : 2;
      good = load_matrix(model, layer.qkv[part], source, part == 0 ? width : kv_width, c.hidden_size);
    } else if (strcmp(rest, "attn_output.weight") == 0) {
      good = load_matrix(model, layer.output, source, c.hidden_size, width);
    } else if (strcmp(rest, "ffn_gate.weight") == 0) {
      good = load_gate_up(model, layer, source, true);
    } else if (strcmp(rest, "ffn_up.weight") == 0) {
      good = load_gate_up(model, layer, source, false);
    } else if (strcmp(rest, "ffn_down.weight") == 0) {
      good = load_matrix(model, layer.down, source, c.hidden_size, c.intermediate_size);
    } else {
      good = fail("tensor '%s' is not known to this architecture", name);
    }
  } else {
    good = fail("tensor '%s' is not known to this architecture", name);
  }
  if (good && discard) {
    // The packed copy is made: let the file's pages go, so that there are never two copies.
    const size_t begin = round_up(reinterpret_cast<size_t>(data), 4096);
    const size_t end = (reinterpret_cast<size_t>(data) + num_bytes) / 4096 * 4096;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
  return good;
}

bool model_finish(pp_model& model) {
  const pp_config& c = model.config;
  if (model.embed.empty()) return fail("tensor 'token_embd.weight' is missing");
  if (!model.norm.data()) return fail("tensor 'output_norm.weight' is missing");
  if (!c.tied_head && model.head.empty()) return fail("tensor 'output.weight' is missing");
  for (int n = 0; n < c.num_layers; ++n) {
    const Layer& layer = model.layers[size_t(n)];
    const char* missing = nullptr;
    if (!layer.attention_norm.data()) missing = "attn_norm";
    else if (layer.qkv[0].empty()) missing = layer.qkv_parts == 3 ? "attn_q" : "attn_qkv";
    else if (layer.qkv_parts == 3 && layer.qkv[1].empty()) missing = "attn_k";
    else if (layer.qkv_parts == 3 && layer.qkv[2].empty()) missing = "attn_v";
    else if (layer.output.empty()) missing = "attn_output";
    else if (!layer.mlp_norm.data()) missing = "ffn_norm";
    else if (!layer.have_up) missing = "ffn_up";
    else if (!layer.have_gate) missing = "ffn_gate";
    else if (layer.down.empty()) missing = "ffn_down";
    if (missing) return fail("tensor 'blk.%d.%s.weight' is missing", n, missing);
  }
  model.finished = true;
  return true;
}

}  // namespace pp
