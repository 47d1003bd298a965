/* PocketPhi's native core: the C API.
 *
 * A model is created from a configuration and filled tensor by tensor (the caller reads the file); a
 * session is one sequence with its cache of keys and values; `pp_forward` runs any number of sessions in
 * one pass over the weights; `pp_sample` chooses a token from logits. Stop tokens, context policy and the
 * choice of the rope factor set belong to the caller.
 *
 * Functions that return a pointer return NULL, and functions that return int return non-zero, when they
 * fail; `pp_last_error` then says why (per thread). Nothing throws. A model and its sessions are used by
 * one thread at a time; different models are independent.
 */
#ifndef POCKETPHI_H
#define POCKETPHI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PP_API __declspec(dllexport)
#else
#define PP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a structure or a function below changes; the binding refuses any other. */
#define PP_ABI_VERSION 2

/* Tensor types, numbered as in GGUF. */
enum {
  PP_F32 = 0,
  PP_F16 = 1,
  PP_Q4_0 = 2,
  PP_Q4_1 = 3,
  PP_Q8_0 = 8,
  PP_Q4_K = 12,
  PP_Q5_K = 13,
  PP_Q6_K = 14,
  PP_BF16 = 30
};

enum { PP_CACHE_F32 = 0, PP_CACHE_F16 = 1, PP_CACHE_Q8 = 2 };
enum { PP_ROPE_PLAIN = 0, PP_ROPE_SHORT = 1, PP_ROPE_LONG = 2 };
enum { PP_WANT_NONE = 0, PP_WANT_LAST = 1, PP_WANT_ALL = 2 };
/* How activations meet quantised weights: as int8 with a scale for every 32 of them, as float32 (slow, for
 * comparisons), or as 16 bits: two int8 numbers each, with the work of two tokens for one. */
enum { PP_ACTIVATIONS_INT8 = 0, PP_ACTIVATIONS_F32 = 1, PP_ACTIVATIONS_INT16 = 2 };

typedef struct pp_model pp_model;
typedef struct pp_session pp_session;

typedef struct {
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t window;           /* tokens a query sees, itself included; 0 means all */
  int32_t tied_head;        /* 1: the output head is the embedding */
  int32_t rope_interleaved; /* 1: pairs are (0,1),(2,3)...; 0: (0,d/2),(1,d/2+1)... as in Phi-3 */
  int32_t max_positions;    /* most positions a session may have */
  float rms_norm_eps;
  /* Angles per position for every rotary pair (head_dim / 2 numbers; NULL: this set does not exist) and
   * the factor on cos and sin. Index: PP_ROPE_*. Copied by pp_model_create. */
  const float* inv_freq[3];
  float rope_magnitude[3];
} pp_config;

typedef struct {
  int32_t num_threads;      /* 0: the CPUs this process may use */
  int32_t cache_type;       /* PP_CACHE_* */
  int32_t max_batch_tokens; /* tokens computed in one internal step; 0: 256 */
  int32_t activations;      /* PP_ACTIVATIONS_* */
  int32_t pin_threads;      /* 1: one CPU for each worker */
  const char* kernels;      /* NULL: the best this CPU has; else "generic", "avx2", "avx512vnni", "amx", "neon" */
} pp_options;

typedef struct {
  pp_session* session;
  const int32_t* ids;
  int32_t num_ids;
  int32_t want;  /* PP_WANT_* */
  float* logits; /* vocab_size floats for LAST, num_ids * vocab_size for ALL */
} pp_work;

typedef struct {
  pp_config config; /* inv_freq points into the model */
  const char* kernels;
  int32_t num_threads;
  int32_t cache_type;
  int32_t max_batch_tokens;
  int64_t weight_bytes;
  int64_t cache_bytes_per_token;
  int64_t working_bytes;
  int64_t read_bytes_per_token; /* weight bytes that one decoded token reads */
} pp_info;

/* How tokens are chosen. Steps in this order: bias, penalties, mask; temperature; top_k, top_p, min_p; draw. */
typedef struct {
  double temperature;       /* 0: the largest logit, the lowest id among equals */
  double top_p;             /* 1: off. The shortest run of largest whose probability reaches it */
  double min_p;             /* 0: off. At least this fraction of the largest probability */
  int32_t top_k;            /* 0: off */
  float repetition_penalty; /* 1: off. Divides positive and multiplies negative logits of prompt and answer */
  float presence_penalty;   /* 0: off. Subtracted once for what is in the answer */
  float frequency_penalty;  /* 0: off. Subtracted for every time */
  uint64_t seed;
  const int32_t* bias_ids; /* [num_bias], each at most once, and what is added to their logits */
  const float* bias;
  int32_t num_bias;
} pp_sampling;

typedef struct {
  int32_t id;
  double logprob;
} pp_scored;

typedef struct {
  const float* logits; /* [vocab_size], finite */
  int32_t vocab_size;
  int32_t num_prompt, num_answer; /* the draw depends on the seed and num_answer alone */
  int32_t num_top;
  const int32_t* prompt;
  const int32_t* answer;
  const uint32_t* mask; /* bit i % 32 of word i / 32: token i is allowed; NULL: all are */
  pp_scored* top;       /* [num_top] best by the raw logits; NULL: no log-probabilities are asked for */
  int32_t token;        /* out */
  double logprob;       /* out, with `top`: log-softmax of the raw logits */
} pp_choice;

PP_API int pp_abi_version(void);
PP_API const char* pp_last_error(void);
/* Comma-separated kernel sets that this machine can run, best first. */
PP_API const char* pp_kernels_available(void);

PP_API pp_model* pp_model_create(const pp_config* config, const pp_options* options);
/* Copy (and repack) one tensor, row-major [rows, cols], vectors as rows = 1. Names are GGUF's:
 * token_embd.weight, output.weight, output_norm.weight, and in blk.N.: attn_norm, attn_qkv or attn_q,
 * attn_k and attn_v, attn_output, ffn_norm, ffn_up (with ffn_gate, or fused: gate rows first), ffn_down.
 * `store_type` is the type to keep it in (PP_Q4_0, PP_Q8_0 from float types; else the same type).
 * `discard` 1 says that data lies in a private file mapping whose pages may be dropped after reading. */
PP_API int pp_model_set_tensor(pp_model* model, const char* name, int32_t type, int64_t rows, int64_t cols,
                               const void* data, size_t num_bytes, int32_t store_type, int32_t discard);
/* Check that every tensor is there and make the model ready. */
PP_API int pp_model_finish(pp_model* model);
PP_API int pp_model_info(const pp_model* model, pp_info* info);
PP_API void pp_model_free(pp_model* model);

PP_API pp_session* pp_session_new(pp_model* model, int32_t capacity, int32_t rope_set);
PP_API void pp_session_free(pp_session* session);
PP_API int32_t pp_session_length(const pp_session* session);
PP_API int pp_session_truncate(pp_session* session, int32_t length);
PP_API int pp_session_reset(pp_session* session, int32_t rope_set);
/* Turn cached keys to another factor set by the difference of the angles. */
PP_API int pp_session_rotate(pp_session* session, int32_t rope_set);
/* Bytes that pp_session_save writes; it fails when num_bytes is another number. */
PP_API int64_t pp_session_save_size(const pp_session* session);
PP_API int pp_session_save(const pp_session* session, void* data, size_t num_bytes);
PP_API pp_session* pp_session_restore(pp_model* model, const void* data, size_t num_bytes, int32_t capacity);

/* Append the ids of every item to its session and compute. All or nothing: on failure no session has
 * changed its length. A token's logits do not depend on the other items or on how ids were cut up. */
PP_API int pp_forward(pp_model* model, const pp_work* work, int32_t num_work);

/* Choose the next token. A function of its arguments alone, the same on every machine. */
PP_API int pp_sample(const pp_sampling* how, pp_choice* choice);

/* What this machine gives, for benchmarks: bytes/s read from memory by `num_threads` threads, and int8
 * multiply-adds/s of the matrix kernel's inner instruction. Takes about `seconds` in total. */
PP_API int pp_probe(pp_model* model, double seconds, double* read_bytes_per_s, double* int8_macs_per_s);

#ifdef __cplusplus
}
#endif
#endif
