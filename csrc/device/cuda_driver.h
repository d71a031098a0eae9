// The few functions of the CUDA driver that hand-offs need. They are found at run time: building
// hybrid needs no CUDA, and one build serves machines with and without it.
//
// Declarations follow the CUDA driver API's documentation (docs.nvidia.com/cuda/cuda-driver-api).
// Stream memory operations are looked up by their _v2 names. The names without _v2 are an older
// interface that drivers disable by default.
#pragma once

#include <cstdint>
#include <string>

namespace hybrid {

class CudaDriver {
 public:
  // `library`: such as "libcuda.so.1". Throws std::runtime_error, which says what is missing, if
  // there is no such library or if it lacks a function that every driver has.
  explicit CudaDriver(const std::string& library);
  ~CudaDriver();
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  using HostFunction = void (*)(void*);

  int version() const { return version_; }  // such as 13000; 0 if the driver does not say
  bool has_memory_operations() const { return batch_ != nullptr && write_ != nullptr; }

  // Each of these enqueues an operation on a stream. It returns CUDA's error code, which is 0 if
  // all is well. Addresses are those that the device sees.
  int Write(uint64_t stream, uint64_t address, uint32_t value) const;
  // Waits until *address == value, then sets *address to `then`. Nothing on the stream comes
  // between.
  int WaitThenWrite(uint64_t stream, uint64_t address, uint32_t value, uint32_t then) const;
  int LaunchHostFunction(uint64_t stream, HostFunction function, void* argument) const;
  // The address at which the device sees pinned host memory. With unified addressing, which every
  // 64-bit system has, that is the host's own address. It is then returned even if the driver does
  // not know an address within an allocation.
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
