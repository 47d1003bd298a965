// The loops over a vocabulary that sampling is made of, once for each width of registers.
#pragma once

#include <cstdint>

namespace pp {

struct VocabularyScan {
  float largest;
  int32_t first;     // lowest id of it
  int32_t infinite;  // how many are NaN or +infinity, or -infinity where that is not allowed
};

struct VocabularyLoops {
  const char* name;
  VocabularyScan (*scan)(const float* values, int32_t count, bool minus_infinity);
  // exp((value - largest) / temperature) as whole numbers of 2^-40; returns their sum.
  uint64_t (*weights)(const float* values, int32_t count, double largest, double inverse_temperature, uint64_t* out);
  double (*exponentials)(const float* values, int32_t count, double largest);  // the sum of exp(value - largest)
};

// What this machine can run, plain C++ first and the best last; null beyond the last.
const VocabularyLoops* vocabulary_loops(int index);

}  // namespace pp
