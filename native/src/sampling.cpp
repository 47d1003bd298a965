// From logits to a token. Everything that decides is a comparison, a whole number, or arithmetic of single
// steps in a stated order, so that every compiler, instruction set and the NumPy twin
// (pocketphi/engine/sampler.py) choose the same token from the same logits:
//
//  * a weight is exp((logit - largest) / temperature) as a whole number of 2^-40, by the polynomial below
//    (no library's exp); whole numbers have no order of summing;
//  * the draw is a whole number of 53 bits made of seed and place.
//
// Legend: V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "common.h"
#include "pocketphi.h"
#include "sampling.h"

namespace pp {

namespace {

constexpr int kWeightBits = 40;
constexpr size_t kFirst = 256;  // nearly always so many of the largest decide a draw
constexpr int kLanes = 8;

// ---- loops over a vocabulary, for the compiler to widen, once for each width of registers ----------------------

#define PP_INLINE __attribute__((always_inline)) inline

// Of a float's bits: an integer that is ordered as the floats are (NaN beyond both infinities).
PP_INLINE int32_t ordered(float value) {
  int32_t bits;
  memcpy(&bits, &value, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
constexpr int32_t kInfinity = 0x7f800000, kMinusInfinity = int32_t(0x807fffff);

PP_INLINE VocabularyScan scan_loop(const float* values, int32_t count, bool minus_infinity) {
  // A zero without a sign, so that both zeros are equal as they are for the comparison of floats.
  const int32_t least = minus_infinity ? kMinusInfinity : kMinusInfinity + 1;
  int32_t top = INT32_MIN, bad = 0;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t key = ordered(values[i] + 0.0f);
    top = key > top ? key : top;
    bad += int32_t(key >= kInfinity) + int32_t(key < least);
  }
  VocabularyScan found{0.0f, -1, bad};
  if (bad) return found;
  const int32_t bits = top ^ ((top >> 31) & 0x7fffffff);
  memcpy(&found.largest, &bits, 4);
  int32_t at = 0;
  for (int32_t here = 0; at + 64 <= count; at += 64) {
    for (int32_t j = 0; j < 64; ++j) here |= int32_t(values[at + j] == found.largest);
    if (here) break;
  }
  while (values[at] != found.largest) ++at;
  found.first = at;
  return found;
}

// exp(x) for x from -64 to 0 as mantissa p and exponent k: x = k ln 2 + r, exp(r) by its series.
constexpr double kLog2E = 1.4426950408889634, kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
constexpr double kWhole = 4503599627370496.0;  // 2^52: so does adding it to a number from 0

struct Exponential {
  double mantissa;
  uint64_t exponent;  // k in its low 12 bits
};

PP_INLINE Exponential exponential(float value, double largest, double inverse) {
  double x = (double(value) - largest) * inverse;
  x = x > -64.0 ? x : -64.0;
  const double t = x * kLog2E + kRound;
  const double k = t - kRound;
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double p = 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  Exponential e;
  e.mantissa = p;
  memcpy(&e.exponent, &t, 8);
  return e;
}

PP_INLINE double power_of_two(uint64_t k, int more) {
  const uint64_t bits = (k << 52) + (uint64_t(1023 + more) << 52);
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

// Weights as whole numbers of 2^-kWeightBits; returns their sum.
PP_INLINE uint64_t weights_loop(const float* values, int32_t count, double largest, double inverse, uint64_t* weights) {
  uint64_t total = 0;
  for (int32_t i = 0; i < count; ++i) {
    const Exponential e = exponential(values[i], largest, inverse);
    const double scaled = e.mantissa * power_of_two(e.exponent, kWeightBits) + kWhole;
    uint64_t bits;
    memcpy(&bits, &scaled, 8);
    weights[i] = bits - (uint64_t(1023 + 52) << 52);
    total += weights[i];
  }
  return total;
}

// The sum of exp(value - largest): lane i % kLanes by lane, then the lanes in order.
PP_INLINE double exponentials_loop(const float* values, int32_t count, double largest) {
  double lanes[kLanes] = {};
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int32_t j = 0; j < kLanes; ++j) {
      const Exponential e = exponential(values[i + j], largest, 1.0);
      lanes[j] += e.mantissa * power_of_two(e.exponent, 0);
    }
  for (int32_t j = 0; i + j < count; ++j) {
    const Exponential e = exponential(values[i + j], largest, 1.0);
    lanes[j] += e.mantissa * power_of_two(e.exponent, 0);
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// The same operations in the same order (none fused: see CMakeLists.txt), so the same bits.
#define PP_LOOPS(NAME, TARGET)                                                                                \
  TARGET VocabularyScan scan_##NAME(const float* v, int32_t n, bool minus) { return scan_loop(v, n, minus); }           \
  TARGET uint64_t weights_##NAME(const float* v, int32_t n, double largest, double inverse, uint64_t* w) {    \
    return weights_loop(v, n, largest, inverse, w);                                                           \
  }                                                                                                           \
  TARGET double exponentials_##NAME(const float* v, int32_t n, double largest) {                              \
    return exponentials_loop(v, n, largest);                                                                  \
  }                                                                                                           \
  constexpr VocabularyLoops loops_##NAME = {#NAME, scan_##NAME, weights_##NAME, exponentials_##NAME};

PP_LOOPS(generic, )
#if defined(__x86_64__)
PP_LOOPS(avx2, __attribute__((target("avx2"))))
PP_LOOPS(avx512, __attribute__((target("avx2,avx512f,avx512dq,avx512vl,avx512bw,prefer-vector-width=512"))))
#endif

const VocabularyLoops& best_loops() {
  static const VocabularyLoops* const best = [] {
    const VocabularyLoops* found = &loops_generic;
    for (int i = 0; vocabulary_loops(i); ++i) found = vocabulary_loops(i);
    return found;
  }();
  return *best;
}

// ---- the largest, in order -----------------------------------------------------------------------------------

// A logit and its token as one number: larger logits first, among equals the lower id.
inline uint64_t rank(float value, int32_t id) {
  return (uint64_t(uint32_t(ordered(value + 0.0f)) ^ 0x80000000u) << 32) | uint32_t(~id);
}
inline int32_t id_of(uint64_t rank) { return ~int32_t(uint32_t(rank)); }

// The `count` largest, best first, into `out`.
void largest_of(const float* values, int32_t size, size_t count, std::vector<uint64_t>& out) {
  out.clear();
  if (count > size_t(size)) count = size_t(size);
  if (!count) return;
  const auto cut = [&] {
    std::nth_element(out.begin(), out.begin() + std::ptrdiff_t(count - 1), out.end(), std::greater<>());
    out.resize(count);
    return out[count - 1];
  };
  float least = -INFINITY;  // what comes later must be larger, not equal: of equals the lower ids stay
  bool full = false;
  for (int32_t i = 0; i < size; ++i) {
    if (full && values[i] <= least) continue;
    out.push_back(rank(values[i], i));
    if (out.size() < 2 * count + 64) continue;
    least = values[id_of(cut())];
    full = true;
  }
  if (out.size() > count) cut();
  std::sort(out.begin(), out.end(), std::greater<>());
}

// ---- one draw ------------------------------------------------------------------------------------------------

uint64_t mix(uint64_t z) {  // SplitMix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// 53 bits that depend on seed and place alone.
uint64_t draw_of(uint64_t seed, int64_t place) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
  return mix(mix(seed ^ kStep) + uint64_t(place + 1) * kStep) >> 11;
}

struct Room {  // kept from call to call
  std::vector<float> adjusted;
  std::vector<uint64_t> weights, ranks;
  std::vector<float> counts;
};

int32_t draw_token(const pp_sampling& how, const float* values, int32_t size, float largest, uint64_t draw, Room& room) {
  // A temperature too small to be inverted is as good as the smallest that can.
  const double inverse = std::min(1.0 / how.temperature, 1.7976931348623157e308);
  room.weights.resize(size_t(size));
  uint64_t total = 0;
  size_t count = kFirst;
  const uint64_t least = how.min_p > 0 ? uint64_t(std::ceil(how.min_p * double(uint64_t(1) << kWeightBits))) : 0;
  const bool by_mass = how.top_p < 1, all = how.top_k <= 0;
  if (all) {
    total = best_loops().weights(values, size, double(largest), inverse, room.weights.data());
  } else {
    count = size_t(how.top_k);
    largest_of(values, size, count, room.ranks);
    for (uint64_t r : room.ranks)
      total += best_loops().weights(values + id_of(r), 1, double(largest), inverse, room.weights.data() + id_of(r));
  }
  const uint64_t enough = by_mass ? std::max<uint64_t>(1, uint64_t(std::ceil(how.top_p * double(total)))) : 0;
  for (;; count *= 8) {
    if (all) largest_of(values, size, count, room.ranks);
    // Cut to top_p and min_p: `kept` of them, `mass` in all.
    uint64_t mass = 0;
    size_t kept = 0;
    bool cut = !all;
    for (uint64_t r : room.ranks) {
      const uint64_t weight = room.weights[size_t(id_of(r))];
      if (weight < least) {
        cut = true;
        break;
      }
      mass += weight;
      ++kept;
      if (by_mass && mass >= enough) {
        cut = true;
        break;
      }
    }
    // Without a cut so far all of the vocabulary may be drawn, and this part may hold the draw already.
    if (!cut && room.ranks.size() < size_t(size)) {
      if (by_mass || least) continue;
    }
    const uint64_t whole = cut ? mass : total;
    const uint64_t target = uint64_t((unsigned __int128)(draw)*whole >> 53);
    if (!cut && target >= mass && room.ranks.size() < size_t(size)) continue;
    uint64_t sum = 0;
    for (size_t i = 0; i < kept; ++i) {
      sum += room.weights[size_t(id_of(room.ranks[i]))];
      if (sum > target) return id_of(room.ranks[i]);
    }
    return id_of(room.ranks[kept - 1]);  // never: the target is below the sum
  }
}

// ---- bias, penalties, mask -------------------------------------------------------------------------------------

// Every step as the twin does it: float32, one operation at a time.
void adjust(const pp_sampling& how, const pp_choice& c, Room& room) {
  const size_t size = size_t(c.vocab_size);
  room.adjusted.assign(c.logits, c.logits + size);
  float* out = room.adjusted.data();
  for (int32_t i = 0; i < how.num_bias; ++i) out[how.bias_ids[i]] += how.bias[i];
  if (how.repetition_penalty != 1.0f) {
    room.counts.assign(size, 0.0f);
    const auto once = [&](const int32_t* ids, int32_t count) {
      for (int32_t i = 0; i < count; ++i) {
        const size_t id = size_t(ids[i]);
        if (room.counts[id] != 0.0f) continue;
        room.counts[id] = 1.0f;
        out[id] = out[id] > 0 ? out[id] / how.repetition_penalty : out[id] * how.repetition_penalty;
      }
    };
    once(c.prompt, c.num_prompt);
    once(c.answer, c.num_answer);
  }
  if (how.presence_penalty != 0.0f || how.frequency_penalty != 0.0f) {
    room.counts.assign(size, 0.0f);
    for (int32_t i = 0; i < c.num_answer; ++i) room.counts[size_t(c.answer[i])] += 1.0f;
    for (int32_t i = 0; i < c.num_answer; ++i) {
      float& count = room.counts[size_t(c.answer[i])];
      if (count == 0.0f) continue;
      out[c.answer[i]] -= how.presence_penalty;
      out[c.answer[i]] -= how.frequency_penalty * count;
      count = 0.0f;
    }
  }
  if (!c.mask) return;
  for (size_t at = 0; at < size; at += 32) {
    const uint32_t word = c.mask[at / 32];
    if (word == 0xffffffffu) continue;
    const size_t end = std::min(size, at + 32);
    for (size_t i = at; i < end; ++i)
      if (!(word >> (i - at) & 1)) out[i] = -INFINITY;
  }
}

bool all_inside(const int32_t* ids, int32_t count, int32_t size) {
  for (int32_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= size) return false;
  return true;
}

bool check(const pp_sampling& s, const pp_choice& c) {
  if (c.vocab_size < 1 || !c.logits) return fail("no logits");
  // The sum of all weights must fit 63 bits.
  if (c.vocab_size > 1 << 22) return fail("a vocabulary of %d is more than %d", c.vocab_size, 1 << 22);
  if (c.num_prompt < 0 || c.num_answer < 0 || s.num_bias < 0 || c.num_top < 0) return fail("a negative count");
  if ((c.num_prompt && !c.prompt) || (c.num_answer && !c.answer) || (s.num_bias && (!s.bias_ids || !s.bias)) ||
      (c.num_top && !c.top))
    return fail("a count without its numbers");
  if (!(s.temperature >= 0) || !(s.temperature < INFINITY)) return fail("temperature must be at least 0");
  if (!(s.top_p > 0 && s.top_p <= 1)) return fail("top_p must be above 0 and at most 1");
  if (!(s.min_p >= 0 && s.min_p <= 1)) return fail("min_p must be between 0 and 1");
  if (s.top_k < 0) return fail("top_k must be at least 0");
  if (!(s.repetition_penalty > 0 && s.repetition_penalty < INFINITY)) return fail("repetition_penalty must be above 0");
  if (!std::isfinite(s.presence_penalty) || !std::isfinite(s.frequency_penalty)) return fail("a penalty that is no number");
  if (!all_inside(s.bias_ids, s.num_bias, c.vocab_size)) return fail("a biased token outside the vocabulary of %d", c.vocab_size);
  return true;
}

bool sample(const pp_sampling& how, pp_choice& c) {
  if (!check(how, c)) return false;
  static thread_local Room room;
  const VocabularyScan raw = best_loops().scan(c.logits, c.vocab_size, false);
  if (raw.infinite)
    return fail("the model produced %d logits of %d that are not finite", raw.infinite, c.vocab_size);
  const bool history = how.repetition_penalty != 1.0f || how.presence_penalty != 0.0f || how.frequency_penalty != 0.0f;
  const float* values = c.logits;
  VocabularyScan scan = raw;
  if (history || how.num_bias || c.mask) {
    if (history && (!all_inside(c.prompt, c.num_prompt, c.vocab_size) || !all_inside(c.answer, c.num_answer, c.vocab_size)))
      return fail("a token outside the vocabulary of %d", c.vocab_size);
    adjust(how, c, room);
    values = room.adjusted.data();
    scan = best_loops().scan(values, c.vocab_size, true);
    if (scan.infinite) return fail("bias and penalties make %d logits infinite", scan.infinite);
    if (scan.largest == -INFINITY)
      return fail("no token is allowed here: the mask or the bias rules out the whole vocabulary");
  }
  c.token = scan.first;
  if (how.temperature > 0)
    c.token = draw_token(how, values, c.vocab_size, scan.largest, draw_of(how.seed, c.num_answer), room);
  if (!c.top) return true;
  const double base = double(raw.largest) + std::log(best_loops().exponentials(c.logits, c.vocab_size, double(raw.largest)));
  c.logprob = double(c.logits[c.token]) - base;
  largest_of(c.logits, c.vocab_size, size_t(c.num_top), room.ranks);
  for (size_t i = 0; i < size_t(c.num_top); ++i) {
    const int32_t id = i < room.ranks.size() ? id_of(room.ranks[i]) : -1;
    c.top[i] = {id, id < 0 ? 0.0 : double(c.logits[id]) - base};
  }
  return true;
}

}  // namespace

const VocabularyLoops* vocabulary_loops(int index) {
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw");
  if (index == 1 && __builtin_cpu_supports("avx2")) return &loops_avx2;
  if (index == 2 && wide) return &loops_avx512;
#endif
  return index == 0 ? &loops_generic : nullptr;
}

}  // namespace pp

extern "C" int pp_sample(const pp_sampling* how, pp_choice* choice) {
  if (!how || !choice) {
    pp::fail("no settings or choice");
    return 1;
  }
  return pp::sample(*how, *choice) ? 0 : 1;
}
