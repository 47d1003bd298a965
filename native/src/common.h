// What every file of the core uses: errors without exceptions, and memory that can say no.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pp {

// Sets the calling thread's error message (printf style) and returns false.
bool fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* last_error();

// Zeroed pages from the operating system, given memory only when touched. `huge` asks for huge pages:
// right for weights, wrong for memory that is to grow with use.
class Pages {
 public:
  Pages() = default;
  ~Pages() { release(); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  Pages(Pages&& other) noexcept { take(other); }
  Pages& operator=(Pages&& other) noexcept {
    if (this != &other) {
      release();
      take(other);
    }
    return *this;
  }
  bool allocate(size_t bytes, bool huge);
  void release();
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void take(Pages& other) {
    data_ = other.data_;
    size_ = other.size_;
    other.data_ = nullptr;
    other.size_ = 0;
  }
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// IEEE half and bfloat16 without hardware, for the places where speed does not matter.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
inline float bf16_to_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

}  // namespace pp
