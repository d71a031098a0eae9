// DeviceLink: how a GPU's stream and a CPU session exchange data within one token, without a call
// into the driver. Each such exchange is a hand-off.
//
// Each hand-off of a token has a slot: two flags, request and ack, in memory that both devices see.
// A hand-off has five steps:
// 1. The stream writes request = 1.
// 2. The session's thread, which spins on the request, resets it.
// 3. The session's thread runs the program's segment of the slot's number.
// 4. The session's thread writes ack = 1.
// 5. The stream, which waits for the ack, sees it and resets it in one operation.
//
// All flags are then 0 again, so the device can replay a recorded token unchanged. One Exchange
// holds the data of all slots, since the hand-offs of one stream follow one another.
//
// If anything goes wrong, the stream is never left waiting. The link then fills the exchange with
// NaN, so that nothing computed from it can pass for text. It writes every ack, and error() says
// what happened. The link is useless from then on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "device/cuda_driver.h"
#include "session/session.h"

namespace hybrid {

constexpr int64_t kFlagStride = 64;  // bytes; no two flags share a cache line

class DeviceLink {
 public:
  enum class Error : int32_t {
    kNone = 0,
    kNoRequest = 1,  // the device sent no request in time
    kNoAnswer = 2,   // the session's thread did not answer in time
    kAbandoned = 3,  // the caller gave up, or an answer failed
  };

  // `flags`: FlagBytes(n_slots) bytes of zeros, on a 64-byte boundary. `exchange` has `n_tokens`
  // rows. Both must outlive the link. `patience_s`: how many seconds each device waits for the
  // other.
  DeviceLink(uint8_t* flags, int32_t n_slots, const Exchange& exchange, int32_t hidden_size,
             int32_t n_tokens, double patience_s);
  ~DeviceLink();
  DeviceLink(const DeviceLink&) = delete;
  DeviceLink& operator=(const DeviceLink&) = delete;

  static int64_t FlagBytes(int32_t n_slots) { return 2 * kFlagStride * n_slots; }
  int32_t n_slots() const { return n_slots_; }
  const Exchange& exchange() const { return exchange_; }
  Error error() const { return error_.load(); }

  // For the CPU. From Arm to the end of Serve, a watchdog abandons the link if the session's thread
  // does not answer in time.
  void Arm();
  // Answers every slot, in order, with the session's segment of that number. Returns false if the
  // link failed.
  bool Serve(Session& session);
  void Abandon(Error error);

  // For the device, if a thread acts for it: a host function of the stream, or a test.
  void Request(int32_t slot) { Flag(2 * slot).store(1, std::memory_order_release); }
  // Returns once there is an answer or the link has failed.
  void AwaitAnswer(int32_t slot);

  // For the device, as operations of a CUDA stream that can be recorded. Each returns CUDA's error
  // code.
  int EnqueueRequest(const CudaDriver& driver, uint64_t stream, int32_t slot, bool by_host);
  int EnqueueWait(const CudaDriver& driver, uint64_t stream, int32_t slot, bool by_host);

 private:
  struct HostCall {
    DeviceLink* link;
    int32_t slot;
  };
  std::atomic<uint32_t>& Flag(int32_t index) const {
    return *reinterpret_cast<std::atomic<uint32_t>*>(flags_ + index * kFlagStride);
  }
  bool AwaitRequest(int32_t slot);
  void Watch();

  uint8_t* const flags_;
  const int32_t n_slots_, hidden_size_, n_tokens_;
  const Exchange exchange_;
  const int64_t patience_ns_;
  std::vector<HostCall> host_calls_;
  std::atomic<Error> error_{Error::kNone};
  std::atomic<int64_t> alive_ns_{0};  // when the session's thread was last active; 0: not armed
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread watchdog_;
};

}  // namespace hybrid
