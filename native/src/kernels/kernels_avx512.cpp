#include <immintrin.h>

#include "kernels.h"

namespace pp {
namespace {

template <int i>
struct Index {
  static constexpr int value = i;
};

#include "simd_avx512.h"
#include "lanes.inc"
#include "kernels.inc"
#include "attention.inc"

}  // namespace

const Kernels kernels_avx512vnni = {"avx512vnni", 0, linear, rms_norm, quantize, attend, merge, store_kv, rope, int8_probe, read_probe};

}  // namespace pp
