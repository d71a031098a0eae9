#include "device/device_link.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "platform.h"

namespace hybrid {

namespace {

constexpr int64_t kSpinNs = 2'000'000;  // after this time, a wait sleeps between its checks
constexpr auto kNap = std::chrono::microseconds(50);

// Waits until `is_done`, at most `patience_ns`. It reads the clock only now and then, and passes
// each reading to `tell`. Returns false if the time is over.
template <typename Done, typename Tell>
bool SpinUntil(const Done& is_done, int64_t patience_ns, const Tell& tell) {
  const int64_t started = platform::Nanoseconds();
  for (int32_t spins = 1;; ++spins) {
    if (is_done()) return true;
    platform::Pause();
    if (spins % 64 != 0) continue;
    const int64_t now = platform::Nanoseconds(), waited = now - started;
    tell(now);
    if (waited > patience_ns) return false;
    if (waited > kSpinNs) std::this_thread::sleep_for(kNap);
  }
}

}  // namespace

DeviceLink::DeviceLink(uint8_t* flags, int32_t n_slots, const Exchange& exchange,
                       int32_t hidden_size, int32_t n_tokens, double patience_s)
    : flags_(flags),
      n_slots_(n_slots),
      hidden_size_(hidden_size),
      n_tokens_(n_tokens),
      exchange_(exchange),
      patience_ns_(static_cast<int64_t>(patience_s * 1e9)) {
  static_assert(sizeof(std::atomic<uint32_t>) == 4, "flags are words that the device writes");
  for (int32_t slot = 0; slot < n_slots; ++slot) host_calls_.push_back({this, slot});
  watchdog_ = std::thread(&DeviceLink::Watch, this);
}

DeviceLink::~DeviceLink() {
  Abandon(Error::kAbandoned);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  watchdog_.join();
}

void DeviceLink::Arm() {
  alive_ns_.store(platform::Nanoseconds());
  wake_.notify_all();
}

bool DeviceLink::Serve(Session& session) {
  const AwakePool awake(session.runner().pool());
  for (int32_t slot = 0; slot < n_slots_; ++slot) {
    if (!AwaitRequest(slot)) return false;
    session.RunSegment(slot);
    if (error() != Error::kNone) return false;
    Flag(2 * slot + 1).store(1, std::memory_order_release);
    alive_ns_.store(platform::Nanoseconds());
  }
  alive_ns_.store(0);
  return true;
}

bool DeviceLink::AwaitRequest(int32_t slot) {
  std::atomic<uint32_t>& request = Flag(2 * slot);
  const bool is_there = SpinUntil(
      [&] { return request.load(std::memory_order_acquire) != 0 || error() != Error::kNone; },
      patience_ns_,
      // A thread that waits here is alive. If the wait is long, it is the device that does not
      // answer.
      [&](int64_t now) { alive_ns_.store(now, std::memory_order_relaxed); });
  if (!is_there) Abandon(Error::kNoRequest);
  request.store(0, std::memory_order_relaxed);
  alive_ns_.store(platform::Nanoseconds());
  return error() == Error::kNone;
}

void DeviceLink::AwaitAnswer(int32_t slot) {
  std::atomic<uint32_t>& ack = Flag(2 * slot + 1);
  // If nobody answers, the watchdog ends this wait. The limit is twice its patience, in case the
  // watchdog fails too.
  SpinUntil([&] { return ack.load(std::memory_order_acquire) != 0; }, 2 * patience_ns_,
            [](int64_t) {});
  if (error() == Error::kNone) ack.store(0, std::memory_order_relaxed);
}

void DeviceLink::Abandon(Error error) {
  Error none = Error::kNone;
  if (!error_.compare_exchange_strong(none, error)) return;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t n = int64_t{n_tokens_} * hidden_size_;
  std::fill_n(exchange_.x, n, nan);
  std::fill_n(exchange_.y, n, nan);
  for (int32_t slot = 0; slot < n_slots_; ++slot)
    Flag(2 * slot + 1).store(1, std::memory_order_release);
}

void DeviceLink::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    // The watchdog also wakes without a notification: Arm holds no lock, so that it never waits,
    // and a notification may be missed.
    wake_.wait_for(lock, std::chrono::nanoseconds(patience_ns_ / 4));
    const int64_t alive = alive_ns_.load();
    if (alive != 0 && platform::Nanoseconds() - alive > patience_ns_) Abandon(Error::kNoAnswer);
  }
}

int DeviceLink::EnqueueRequest(const CudaDriver& driver, uint64_t stream, int32_t slot,
                               bool by_host) {
  if (by_host) {
    const auto request = [](void* call) {
      const HostCall& of = *static_cast<HostCall*>(call);
      of.link->Request(of.slot);
    };
    return driver.LaunchHostFunction(stream, request, &host_calls_[static_cast<size_t>(slot)]);
  }
  return driver.Write(stream, driver.DeviceAddress(flags_ + 2 * slot * kFlagStride), 1);
}

int DeviceLink::EnqueueWait(const CudaDriver& driver, uint64_t stream, int32_t slot, bool by_host) {
  if (by_host) {
    const auto wait = [](void* call) {
      const HostCall& of = *static_cast<HostCall*>(call);
      of.link->AwaitAnswer(of.slot);
    };
    return driver.LaunchHostFunction(stream, wait, &host_calls_[static_cast<size_t>(slot)]);
  }
  const uint64_t address = driver.DeviceAddress(flags_ + (2 * slot + 1) * kFlagStride);
  return driver.WaitThenWrite(stream, address, 1, 0);
}

}  // namespace hybrid
