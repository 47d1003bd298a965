// The C API around the model.

#include <ctime>

#include "model.h"

using namespace pp;

namespace {

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

}  // namespace

extern "C" {

int pp_abi_version(void) { return PP_ABI_VERSION; }
const char* pp_last_error(void) { return last_error(); }
const char* pp_kernels_available(void) { return kernels_available(); }

pp_model* pp_model_create(const pp_config* config, const pp_options* options) {
  if (!config) {
    fail("no configuration");
    return nullptr;
  }
  auto* model = new pp_model;
  if (model_init(*model, *config, options)) return model;
  delete model;
  return nullptr;
}

int pp_model_set_tensor(pp_model* model, const char* name, int32_t type, int64_t rows, int64_t cols, const void* data,
                        size_t num_bytes, int32_t store_type, int32_t discard) {
  if (!model || !name || !data) {
    fail("no model, name or data");
    return 1;
  }
  return model_set_tensor(*model, name, type, rows, cols, data, num_bytes, store_type, discard != 0) ? 0 : 1;
}

int pp_model_finish(pp_model* model) { return model && model_finish(*model) ? 0 : 1; }

int pp_model_info(const pp_model* model, pp_info* info) {
  if (!model || !info) {
    fail("no model");
    return 1;
  }
  const pp_model& m = *model;
  const pp_config& c = m.config;
  info->config = c;
  info->kernels = m.kernels->name;
  info->num_threads = m.threads.count();
  info->cache_type = m.cache_type;
  info->max_batch_tokens = m.max_batch_tokens;
  size_t layers = 0;
  for (const Layer& layer : m.layers)
    layers += layer.qkv[0].tiles.size() + layer.qkv[1].tiles.size() + layer.qkv[2].tiles.size() +
              layer.output.tiles.size() + layer.gate_up.tiles.size() + layer.down.tiles.size();
  info->weight_bytes = int64_t(layers + m.embed.tiles.size() + m.head.tiles.size());
  info->read_bytes_per_token = int64_t(layers + (c.tied_head ? m.embed.tiles.size() : m.head.tiles.size()));
  info->cache_bytes_per_token = int64_t(size_t(c.num_layers) * c.num_kv_heads * m.unit_bytes / kChunk);
  const size_t n = size_t(m.max_batch_tokens);
  info->working_bytes = int64_t(n * (size_t(c.hidden_size) + m.qkv_rows() + m.attention_width() + 3 * size_t(c.intermediate_size)) * 4 +
                                (n < 32 ? n : 32) * size_t(c.vocab_size) * 4);
  return 0;
}

void pp_model_free(pp_model* model) { delete model; }

int pp_forward(pp_model* model, const pp_work* work, int32_t num_work) {
  if (!model || (!work && num_work > 0) || num_work < 0) {
    fail("no model or work");
    return 1;
  }
  return model_forward(*model, work, num_work) ? 0 : 1;
}

int pp_probe(pp_model* model, double seconds, double* read_bytes_per_s, double* int8_macs_per_s) {
  if (!model || !(seconds > 0)) {
    fail("no model or no time");
    return 1;
  }
  const int threads = model->threads.count();
  const size_t piece = size_t(1) << 20, pieces = 512;
  Pages memory;
  if (!memory.allocate(piece * pieces, true)) return 1;
  std::atomic<uint64_t> total{0};
  model->threads.run(int(pieces), [&](int i, int) {
    for (size_t k = 0; k < piece; k += 64) memory.data()[size_t(i) * piece + k] = uint8_t(i + k);
  });
  double begin = now_s();
  size_t rounds = 0;
  do {
    model->threads.run(int(pieces), [&](int i, int) { total += model->kernels->read_probe(memory.data() + size_t(i) * piece, piece); });
    ++rounds;
  } while (now_s() - begin < seconds / 2);
  if (read_bytes_per_s) *read_bytes_per_s = double(rounds * pieces * piece) / (now_s() - begin);
  begin = now_s();
  constexpr int64_t kRounds = 2000;
  rounds = 0;
  do {
    model->threads.run(64 * threads, [&](int, int) { total += uint64_t(model->kernels->int8_probe(kRounds)); });
    ++rounds;
  } while (now_s() - begin < seconds / 2);
  // A round is 6 tokens of 8 quads on 16 rows.
  if (int8_macs_per_s) *int8_macs_per_s = double(rounds) * 64.0 * threads * double(kRounds) * 6 * 8 * 4 * 16 / (now_s() - begin);
  return total.load() == 1 ? fail("unlikely") : 0;
}

}  // extern "C"
