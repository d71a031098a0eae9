// Arrays in pages of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "platform.h"

namespace hybrid {

// An array of T in memory from platform::AllocatePages. `n` may be 0.
template <typename T>
class Pages {
 public:
  explicit Pages(int64_t n, bool huge = false)
      : bytes_(static_cast<size_t>(n > 0 ? n : 1) * sizeof(T)),
        data_(static_cast<T*>(platform::AllocatePages(bytes_, huge))) {}
  ~Pages() { platform::FreePages(data_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  T* get() const { return data_; }
  T* operator+(int64_t i) const { return data_ + i; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  const size_t bytes_;
  T* const data_;
};

}  // namespace hybrid
