#include "device/cuda_driver.h"

#include <stdexcept>

#include "platform.h"

namespace hybrid {

namespace {

// CUstreamBatchMemOpParams is a union of 48 bytes, of which these two forms are used.
struct MemoryOperation {
  uint32_t operation;
  uint32_t unused;
  uint64_t address;
  uint64_t value;  // only 32 bits are used
  uint32_t flags;
  uint32_t more_unused;
  uint64_t alias;
  uint64_t padding;
};
static_assert(sizeof(MemoryOperation) == 48, "as in cuda.h");

constexpr uint32_t kWait32 = 1, kWrite32 = 2;  // CUstreamBatchMemOpType
constexpr uint32_t kWaitEqual = 1;             // CU_STREAM_WAIT_VALUE_EQ
// By default a system-wide fence precedes a write.
constexpr uint32_t kWriteDefault = 0;

}  // namespace

CudaDriver::CudaDriver(const std::string& library)
    : library_(platform::OpenLibrary(library.c_str())) {
  if (library_ == nullptr) throw std::runtime_error("no CUDA: there is no " + library);
  write_ = Find("cuStreamWriteValue32_v2");
  batch_ = Find("cuStreamBatchMemOp_v2");
  launch_ = Find("cuLaunchHostFunc");
  address_ = Find("cuMemHostGetDevicePointer_v2");
  name_ = Find("cuGetErrorName");
  void* version = Find("cuDriverGetVersion");
  if (launch_ == nullptr || address_ == nullptr) {
    platform::CloseLibrary(library_);
    throw std::runtime_error("no CUDA: " + library + " lacks cuLaunchHostFunc; its driver is " +
                             "older than CUDA 10");
  }
  if (version != nullptr) reinterpret_cast<int (*)(int*)>(version)(&version_);
}

CudaDriver::~CudaDriver() { platform::CloseLibrary(library_); }

void* CudaDriver::Find(const char* name) const { return platform::FindSymbol(library_, name); }

int CudaDriver::Write(uint64_t stream, uint64_t address, uint32_t value) const {
  using Function = int (*)(void*, uint64_t, uint32_t, unsigned);
  return reinterpret_cast<Function>(write_)(reinterpret_cast<void*>(stream), address, value,
                                            kWriteDefault);
}

int CudaDriver::WaitThenWrite(uint64_t stream, uint64_t address, uint32_t value,
                              uint32_t then) const {
  using Function = int (*)(void*, unsigned, MemoryOperation*, unsigned);
  MemoryOperation both[2] = {{kWait32, 0, address, value, kWaitEqual, 0, 0, 0},
                             {kWrite32, 0, address, then, kWriteDefault, 0, 0, 0}};
  return reinterpret_cast<Function>(batch_)(reinterpret_cast<void*>(stream), 2, both, 0);
}

int CudaDriver::LaunchHostFunction(uint64_t stream, HostFunction function, void* argument) const {
  using Function = int (*)(void*, HostFunction, void*);
  return reinterpret_cast<Function>(launch_)(reinterpret_cast<void*>(stream), function, argument);
}

uint64_t CudaDriver::DeviceAddress(void* host) const {
  using Function = int (*)(uint64_t*, void*, unsigned);
  uint64_t device = 0;
  const int error = reinterpret_cast<Function>(address_)(&device, host, 0);
  return error == 0 ? device : reinterpret_cast<uint64_t>(host);
}

std::string CudaDriver::ErrorName(int error) const {
  using Function = int (*)(int, const char**);
  const char* name = nullptr;
  if (name_ != nullptr) reinterpret_cast<Function>(name_)(error, &name);
  return name != nullptr ? name : "CUDA error " + std::to_string(error);
}

}  // namespace hybrid
