// The model: its weights in tiles, its working memory, and the sessions' caches.
#pragma once

#include <vector>

#include "common.h"
#include "kernels/kernels.h"
#include "pack.h"
#include "pocketphi.h"
#include "threads.h"

namespace pp {

struct Layer {
  Pages attention_norm, mlp_norm;
  Matrix qkv[3];  // one fused matrix, or q, k and v
  Matrix output;
  Matrix gate_up;  // paired
  Matrix down;
  int qkv_parts = 0;
  bool have_gate = false, have_up = false;
};

// One sequence's part of a step: tokens [first, first + count) of the step's flat list.
struct Segment {
  pp_session* session;
  int first, count;
  int start;  // position of its first token
};

}  // namespace pp

struct pp_model {
  pp_config config;
  std::vector<float> inv_freq[3];
  int cache_type = PP_CACHE_F16;
  int max_batch_tokens = 256;
  bool float_activations = false;
  int places = 1;  // of a token in a panel: 2 for activations of 16 bits
  bool finished = false;
  const pp::Kernels* kernels = nullptr;
  pp::Threads threads;

  pp::Matrix embed, head;
  pp::Pages norm;
  std::vector<pp::Layer> layers;

  // Derived sizes.
  int padded_dim = 0;       // head_dim rounded up to 16
  size_t key_bytes = 0;     // keys (and equally values) of one head and chunk
  size_t unit_bytes = 0;    // keys, values and scales of one head and chunk
  int max_query_tokens = 1; // tokens of one attention job

  // Working memory for `working_tokens` tokens.
  int working_tokens = 0;
  pp::Pages x, qkv, mixed, hidden, normed, int_panels, float_panels, logits, cosines, sines, partial, scratch;
  size_t partial_floats = 0;

  int qkv_rows() const { return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim; }
  int attention_width() const { return config.num_heads * config.head_dim; }
};

struct pp_session {
  pp_model* model;
  int capacity = 0;
  int length = 0;
  int rope_set = PP_ROPE_PLAIN;
  int num_chunks = 0;
  pp::Pages cache;

  size_t unit_at(int layer, int chunk, int head) const {
    const size_t heads = size_t(model->config.num_kv_heads);
    return ((size_t(layer) * num_chunks + chunk) * heads + head) * model->unit_bytes;
  }
  uint8_t* keys(int layer, int chunk, int head) const { return cache.data() + unit_at(layer, chunk, head); }
};

namespace pp {

const Kernels* select_kernels(const char* name);  // null with an error set when there is none
const char* kernels_available();

bool model_init(pp_model& model, const pp_config& config, const pp_options* options);
bool model_set_tensor(pp_model& model, const char* name, int type, int64_t rows, int64_t cols, const void* data,
                      size_t num_bytes, int store_type, bool discard);
bool model_finish(pp_model& model);
bool model_forward(pp_model& model, const pp_work* work, int num_work);

}  // namespace pp
