// DeviceLink: how a GPU's stream and a CPU session take turns within one token, without a call into
// the driver.
//
// Each hand-off of a token has a slot of two flags in memory that both see. The stream writes
// request = 1; the session's thread, which spins on it, resets it, runs the program's segment of
// that number and writes ack = 1; the stream waits for that and resets it in one operation. So a
// recorded token can be replayed as it stands. What is exchanged lies in one Exchange for all
// slots: hand-offs of one stream follow one another.
//
// Whatever goes wrong, the stream is never left waiting: then every ack is written, the exchange is
// filled with NaN, so that nothing computed from it can pass for text, and error() says what
// happened. The link is useless from then on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "device/cuda_driver.h"
#include "session/session.h"

namespace hybrid {

constexpr int64_t kFlagStride = 64;  // bytes: no two flags share a cache line

class DeviceLink {
 public:
  enum class Error : int32_t {
    kNone = 0,
    kNoRequest = 1,  // the device did not ask in time
    kNoAnswer = 2,   // the session's thread did not answer in time
    kAbandoned = 3,  // the caller gave up, or an answer failed
  };

  // `flags`: FlagBytes(n_slots) of zeros, on a 64-byte boundary, that outlive the link, as
  // `exchange` does, which has `n_tokens` rows. `patience_s`: how long either side waits for the
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

  // The CPU's side. From Arm to the end of Serve the watchdog answers for a thread that does not.
  void Arm();
  // Answers every slot, in order, with the session's segment of that number. False where the link
  // failed.
  bool Serve(Session& session);
  void Abandon(Error error);

  // The device's side, where a thread plays it: a host function of the stream, or a test.
  void Request(int32_t slot) { Flag(2 * slot).store(1, std::memory_order_release); }
  // Returns once there is an answer, or the link failed.
  void AwaitAnswer(int32_t slot);

  // The device's side as operations of a CUDA stream, to be recorded. Each returns CUDA's error.
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
  std::atomic<int64_t> alive_ns_{0};  // when the session's thread last showed itself; 0: not armed
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread watchdog_;
};

}  // namespace hybrid
