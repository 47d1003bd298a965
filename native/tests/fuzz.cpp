// The C API against bytes from anywhere: configurations, tensors of every type and wrong size, sessions,
// states to restore. With libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer:
//
//     CXX=clang++ cmake -S native -B build/fuzz -DPOCKETPHI_FUZZ=ON && cmake --build build/fuzz -j2
//     build/fuzz/pocketphi_fuzz -max_len=4096 -max_total_time=3600 build/fuzz/corpus
//
// (The GGUF container itself is read in Python, which has no wild pointers; tests/engine/mutations.py damages
// files.) Most inputs describe a small model that is nearly right, so that the deep code is reached: a
// deviation is asked for by single bytes of the input.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "pocketphi.h"

namespace {

struct Input {
  const uint8_t* data;
  size_t size, at = 0;

  uint8_t byte() { return at < size ? data[at++] : 0; }
  int32_t word() {
    uint8_t raw[4];
    for (uint8_t& b : raw) b = byte();
    int32_t value;
    memcpy(&value, raw, 4);
    return value;
  }
  // `usual`, or now and then whatever the input says.
  int32_t mostly(int32_t usual) { return byte() < 4 ? word() : usual; }
  bool flag() { return byte() & 1; }
};

constexpr int kTypes[] = {PP_F32, PP_F16, PP_BF16, PP_Q8_0, PP_Q4_0, PP_Q4_1, PP_Q4_K, PP_Q5_K, PP_Q6_K};

size_t row_bytes(int type, int64_t cols) {
  switch (type) {
    case PP_F32: return size_t(cols) * 4;
    case PP_F16:
    case PP_BF16: return size_t(cols) * 2;
    case PP_Q8_0: return size_t(cols / 32) * 34;
    case PP_Q4_0: return size_t(cols / 32) * 18;
    case PP_Q4_1: return size_t(cols / 32) * 20;
    case PP_Q4_K: return size_t(cols / 256) * 144;
    case PP_Q5_K: return size_t(cols / 256) * 176;
    case PP_Q6_K: return size_t(cols / 256) * 210;
  }
  return size_t(cols);
}

// Tensor data in memory of exactly its size, so that a byte read outside is seen. Finite unless asked.
std::vector<uint8_t> contents(Input& in, size_t bytes, bool wild) {
  std::vector<uint8_t> out(bytes);
  uint32_t state = uint32_t(in.word()) | 1;
  for (size_t i = 0; i < bytes; ++i) {
    state = state * 1664525u + 1013904223u;
    out[i] = uint8_t(state >> 24);
    if (!wild) out[i] &= 0x3b;  // no exponent of ones in any 16 or 32-bit float
  }
  return out;
}

void set(Input& in, pp_model* model, const std::string& name, int64_t rows, int64_t cols) {
  const uint8_t how = in.byte();
  if (how == 1) return;  // missing
  const int type = rows == 1 ? PP_F32 : kTypes[in.byte() % 9];
  int store = type;
  if (how == 2) store = in.flag() ? PP_Q8_0 : PP_Q4_0;
  if (how == 3) rows = in.word() & 0x3ff;
  if (how == 4) cols = in.word() & 0x3ff;
  size_t bytes = rows > 0 && cols > 0 ? size_t(rows) * row_bytes(type, cols) : 0;
  if (bytes > (1u << 20)) return;
  const std::vector<uint8_t> data = contents(in, bytes, how == 5);
  size_t said = bytes;
  if (how == 6) said = size_t(in.word()) & 0xffff;
  if (said > bytes) said = bytes;  // the caller's promise; everything else is the core's to check
  static const uint8_t none = 0;
  pp_model_set_tensor(model, name.c_str(), how == 7 ? in.word() : type, how == 8 ? int64_t(in.word()) << 20 : rows,
                      cols, data.empty() ? &none : data.data(), said, how == 9 ? in.word() : store, 0);
}

// Settings and histories from anywhere; memory of exactly the size that is said, bits of logits at will.
void sample(Input& in) {
  const int32_t vocab = 1 + (in.byte() % 8 ? in.byte() % 70 : in.word() & 0xfff);
  const bool wild = in.byte() < 32;
  std::vector<float> logits(size_t(vocab), 0.0f);
  uint32_t state = uint32_t(in.word()) | 1;
  for (float& v : logits) {
    state = state * 1664525u + 1013904223u;
    v = float(int32_t(state) >> 24) * (in.flag() ? 0.25f : 0.001f);
    if (wild && state % 61 == 0) memcpy(&v, &state, 4);
  }
  std::vector<int32_t> ids[3];
  for (std::vector<int32_t>& list : ids) {
    list.resize(in.byte() % 20);
    for (int32_t& id : list) id = in.mostly(in.byte() % vocab);
  }
  std::vector<float> bias(ids[2].size());
  for (float& b : bias) {
    const int32_t bits = in.word();
    memcpy(&b, &bits, 4);
  }
  std::vector<uint32_t> mask(size_t(vocab + 31) / 32);
  for (uint32_t& word : mask) word = uint32_t(in.word());
  const auto number = [&](double usual) {
    if (in.byte() >= 16) return usual * (in.byte() % 16);
    uint64_t bits = uint64_t(uint32_t(in.word())) << 32 | uint32_t(in.word());
    double value;
    memcpy(&value, &bits, 8);
    return value;
  };
  pp_sampling how{};
  how.temperature = number(0.2), how.top_p = number(1.0 / 15), how.min_p = number(1.0 / 15);
  how.top_k = in.mostly(in.byte() % 9);
  // A double beyond a float's range has no conversion.
  const auto single = [](double v) { return v > -3e38 && v < 3e38 ? float(v) : 1.0f; };
  how.repetition_penalty = single(number(0.2)), how.presence_penalty = single(number(0.1));
  how.frequency_penalty = single(number(0.1));
  how.seed = uint64_t(in.word());
  how.bias_ids = ids[2].data(), how.bias = bias.data(), how.num_bias = int32_t(ids[2].size());
  std::vector<pp_scored> top(in.byte() % 90);
  pp_choice choice{};
  choice.logits = logits.data(), choice.vocab_size = vocab;
  choice.prompt = ids[0].data(), choice.num_prompt = int32_t(ids[0].size());
  choice.answer = ids[1].data(), choice.num_answer = int32_t(ids[1].size());
  choice.mask = in.flag() ? mask.data() : nullptr;
  choice.top = top.empty() ? nullptr : top.data(), choice.num_top = int32_t(top.size());
  choice.token = -1;
  if (pp_sample(&how, &choice) != 0) {
    if (!*pp_last_error()) abort();
    return;
  }
  if (choice.token < 0 || choice.token >= vocab) abort();
  if (choice.mask && !(mask[size_t(choice.token) / 32] >> (choice.token % 32) & 1)) abort();
}

void use(Input& in, pp_model* model, int vocab) {
  std::vector<pp_session*> sessions;
  std::vector<uint8_t> state;
  for (int step = 0; step < 24 && in.at < in.size; ++step) {
    pp_session* one = sessions.empty() ? nullptr : sessions[in.byte() % sessions.size()];
    switch (in.byte() % 8) {
      case 0: {
        pp_session* made = pp_session_new(model, in.mostly(in.byte()), in.byte() % 4);
        if (made) sessions.push_back(made);
        break;
      }
      case 1:
      case 2: {
        std::vector<pp_work> work;
        std::vector<std::vector<int32_t>> ids;
        std::vector<std::vector<float>> logits;
        const size_t count = 1 + in.byte() % 3;
        ids.reserve(count), logits.reserve(count);
        for (size_t i = 0; i < count && i < sessions.size(); ++i) {
          ids.emplace_back(size_t(in.byte() % 40));
          for (int32_t& id : ids.back()) id = in.mostly(in.byte() % (vocab > 0 ? vocab : 1));
          const int want = in.byte() % 3;
          logits.emplace_back(size_t(vocab) * (want == PP_WANT_ALL ? ids.back().size() : size_t(want == PP_WANT_LAST)));
          work.push_back({sessions[(i + in.byte() / 128) % sessions.size()], ids.back().data(),
                          int32_t(ids.back().size()), want, logits.back().data()});
        }
        pp_forward(model, work.data(), int32_t(work.size()));
        break;
      }
      case 3:
        if (one) pp_session_truncate(one, in.mostly(in.byte() % 32));
        break;
      case 4:
        if (one) pp_session_reset(one, in.byte() % 4);
        break;
      case 5:
        if (one) pp_session_rotate(one, in.byte() % 4);
        break;
      case 6:
        if (one) {
          const int64_t size = pp_session_save_size(one);
          if (size < 0 || size > (1 << 22)) break;
          state.assign(size_t(size), 0);
          if (pp_session_save(one, state.data(), state.size()) != 0) abort();
          // Exact size, whole, must come back.
          pp_session* back = pp_session_restore(model, state.data(), state.size(), pp_session_length(one) + 1);
          if (!back && pp_session_length(one) < 200) abort();
          pp_session_free(back);
        }
        break;
      default: {
        std::vector<uint8_t> damaged = state;
        if (damaged.empty()) damaged.resize(in.byte());
        for (int i = in.byte() % 8; i > 0 && !damaged.empty(); --i) damaged[size_t(uint32_t(in.word())) % damaged.size()] = in.byte();
        if (in.flag()) damaged.resize(in.byte() % (damaged.size() + 1));
        pp_session* back = pp_session_restore(model, damaged.data(), damaged.size(), in.mostly(in.byte()));
        if (back) sessions.push_back(back);
      }
    }
    if (sessions.size() > 6) {
      pp_session_free(sessions.back());
      sessions.pop_back();
    }
  }
  for (pp_session* s : sessions) pp_session_free(s);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  if (in.byte() < 64) {
    sample(in);
    return 0;
  }
  const bool wide = in.flag();  // the K formats need rows of 256
  const int heads = 1 + in.byte() % 3, share = 1 + in.byte() % 2, dim = wide ? 32 : 2 * (1 + in.byte() % 20);
  const int hidden = wide ? 256 : 32 * (1 + in.byte() % 3), ffn = wide ? 256 : 32 * (1 + in.byte() % 3);
  const int layers = 1 + in.byte() % 2, vocab = 5 + in.byte() % 60;
  std::vector<float> frequencies(size_t(dim) / 2 + 1024, 0.25f);
  pp_config config{};
  config.vocab_size = in.mostly(vocab);
  config.hidden_size = in.mostly(hidden);
  config.intermediate_size = in.mostly(ffn);
  config.num_layers = in.mostly(layers);
  config.num_heads = in.mostly(heads * share);
  config.num_kv_heads = in.mostly(heads);
  config.head_dim = in.mostly(dim);
  config.window = in.mostly(in.flag() ? 1 + in.byte() % 40 : 0);
  config.tied_head = in.flag();
  config.rope_interleaved = in.flag();
  config.max_positions = in.mostly(256);
  config.rms_norm_eps = 1e-5f;
  config.inv_freq[in.byte() % 3] = frequencies.data();
  config.inv_freq[in.byte() % 3] = frequencies.data();
  for (float& m : config.rope_magnitude) m = 1.0f;
  // The caller's arrays are as long as head_dim says: no promise beyond what was allocated.
  if (config.head_dim > 2048 || config.num_layers > 64) return 0;
  pp_options options{};
  options.num_threads = 1;
  options.cache_type = in.mostly(in.byte() % 3);
  options.max_batch_tokens = in.mostly(1 + in.byte() % 32);
  options.activations = in.byte() % 2;
  static const char* const kernels[] = {nullptr, "generic", "nonsense", "generic"};
  options.kernels = kernels[in.byte() % 4];
  pp_model* model = pp_model_create(&config, &options);
  if (!model) {
    if (!*pp_last_error()) abort();  // a refusal without words
    return 0;
  }
  const int width = heads * share * dim, kv = heads * dim;
  set(in, model, "token_embd.weight", vocab, hidden);
  set(in, model, "output_norm.weight", 1, hidden);
  if (!config.tied_head) set(in, model, "output.weight", vocab, hidden);
  for (int n = 0; n < layers; ++n) {
    const std::string blk = "blk." + std::to_string(in.byte() < 4 ? in.word() : n) + ".";
    set(in, model, blk + "attn_norm.weight", 1, hidden);
    if (in.flag()) {
      set(in, model, blk + "attn_qkv.weight", width + 2 * kv, hidden);
    } else {
      set(in, model, blk + "attn_q.weight", width, hidden);
      set(in, model, blk + "attn_k.weight", kv, hidden);
      set(in, model, blk + "attn_v.weight", kv, hidden);
    }
    set(in, model, blk + "attn_output.weight", hidden, width);
    set(in, model, blk + "ffn_norm.weight", 1, hidden);
    if (in.flag()) {
      set(in, model, blk + "ffn_up.weight", 2 * ffn, hidden);
    } else {
      set(in, model, blk + "ffn_gate.weight", ffn, hidden);
      set(in, model, blk + "ffn_up.weight", ffn, hidden);
    }
    set(in, model, blk + "ffn_down.weight", hidden, ffn);
  }
  pp_info info;
  pp_model_info(model, &info);
  if (pp_model_finish(model) == 0) use(in, model, config.vocab_size);
  else if (!*pp_last_error()) abort();
  pp_model_free(model);
  return 0;
}
