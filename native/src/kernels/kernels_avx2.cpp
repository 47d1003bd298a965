#include <immintrin.h>

#include "kernels.h"

namespace pp {
namespace {

template <int i>
struct Index {
  static constexpr int value = i;
};

#include "simd_avx2.h"
#include "lanes.inc"
#include "kernels.inc"
#include "attention.inc"

}  // namespace

const Kernels kernels_avx2 = {"avx2", 0, linear, rms_norm, quantize, attend, merge, store_kv, rope, int8_probe, read_probe};

}  // namespace pp
