#include "kernels.h"
#include "../common.h"

namespace pp {
namespace {

template <int i>
struct Index {
  static constexpr int value = i;
};

#define PP_PLAIN 1
#include "simd_generic.h"
#include "lanes.inc"
#include "kernels.inc"
#include "attention.inc"

}  // namespace

const Kernels kernels_generic = {"generic", 0, linear, rms_norm, quantize, attend, merge, store_kv, rope, int8_probe, read_probe};

}  // namespace pp
