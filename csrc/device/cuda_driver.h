// The few functions of the CUDA driver that hand-offs need, found at run time: building hybrid
// needs no CUDA, and one build serves machines with and without it.
//
// Declarations follow the CUDA driver API's documentation (docs.nvidia.com/cuda/cuda-driver-api).
// Stream memory operations are asked for by their _v2 names: those without are an older interface
// that drivers disable by default.
#pragma once

#include <cstdint>
#include <string>

namespace hybrid {

class CudaDriver {
 public:
  // `library`: such as "libcuda.so.1". Throws std::runtime_error, saying what is missing, where it
  // or a function that every driver has is not there.
  explicit CudaDriver(const std::string& library);
  ~CudaDriver();
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  using HostFunction = void (*)(void*);

  int version() const { return version_; }  // such as 13000; 0 where the driver does not say
  bool has_memory_operations() const { return batch_ != nullptr && write_ != nullptr; }

  // Each enqueues on a stream and returns CUDA's error code, 0 where all is well. Addresses are
  // those that the device sees.
  int Write(uint64_t stream, uint64_t address, uint32_t value) const;
  // Waits until *address == value, then sets it to `then`: nothing on the stream comes between.
  int WaitThenWrite(uint64_t stream, uint64_t address, uint32_t value, uint32_t then) const;
  int LaunchHostFunction(uint64_t stream, HostFunction function, void* argument) const;
  // The address at which the device sees pinned host memory: with unified addressing, which every
  // 64-bit system has, its own, also where the driver does not know an address within an
  // allocation.
  uint64_t DeviceAddress(void* host) const;
  std::string ErrorName(int error) const;

 private:
  void* Find(const char* name) const;

  void* library_;
  int version_ = 0;
  void *write_ = nullptr, *batch_ = nullptr, *launch_ = nullptr, *address_ = nullptr,
       *name_ = nullptr;
};

}  // namespace hybrid
