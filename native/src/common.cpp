#include "common.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>

namespace pp {

static thread_local char error_text[512] = "";

bool fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error_text, sizeof error_text, format, args);
  va_end(args);
  return false;
}

const char* last_error() { return error_text; }

bool Pages::allocate(size_t bytes, bool huge) {
  release();
  if (bytes == 0) return true;
  constexpr size_t huge_page = size_t(2) << 20;
  // Over-reserve so that the used part can begin on a huge page; untouched pages cost nothing.
  const bool align = huge && bytes >= huge_page;
  const size_t reserved = round_up(bytes, 4096) + (align ? huge_page : 0);
  void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return fail("out of memory: %zu bytes refused by the system", bytes);
  auto* begin = static_cast<uint8_t*>(raw);
  if (align) {
    auto* start = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<size_t>(begin), huge_page));
    if (start != begin) munmap(begin, size_t(start - begin));
    uint8_t* end = start + round_up(bytes, 4096);
    if (end != begin + reserved) munmap(end, size_t(begin + reserved - end));
    begin = start;
#ifdef MADV_HUGEPAGE
    madvise(begin, round_up(bytes, 4096), MADV_HUGEPAGE);
#endif
  }
  data_ = begin;
  size_ = bytes;
  return true;
}

void Pages::release() {
  if (data_) munmap(data_, round_up(size_, 4096));
  data_ = nullptr;
  size_ = 0;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31;
  uint32_t mantissa = bits & 0x3ff;
  uint32_t wide;
  if (exponent == 31) {
    wide = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    wide = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa) {
    uint32_t shift = 113;
    while (!(mantissa & 0x400)) {
      mantissa <<= 1;
      --shift;
    }
    wide = sign | (shift << 23) | ((mantissa & 0x3ff) << 13);
  } else {
    wide = sign;
  }
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t wide;
  __builtin_memcpy(&wide, &value, 4);
  const uint16_t sign = uint16_t((wide >> 16) & 0x8000);
  wide &= 0x7fffffff;
  if (wide >= 0x7f800000) return uint16_t(sign | (wide > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (wide >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds past the largest half
  if (wide < 0x38800000) {                                 // subnormal half: round to multiples of 2^-24
    if (wide < 0x33000000) return sign;
    const uint32_t shift = 126 - (wide >> 23);
    const uint32_t mantissa = (wide & 0x7fffff) | 0x800000;
    uint32_t half = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    if (rest > middle || (rest == middle && (half & 1))) ++half;
    return uint16_t(sign | half);
  }
  wide += 0xfff + ((wide >> 13) & 1);
  return uint16_t(sign | ((wide - 0x38000000) >> 13));
}

}  // namespace pp
