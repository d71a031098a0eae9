// A stand-in for libcuda.so.1. Its streams are threads, and recorded work can be replayed. It
// drives the real device link without a GPU, with jitter and with faults.
//
// Functions that start with cu have the driver's interface; those with stub_ are for the tests.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

using Work = std::function<void()>;

std::atomic<int> fault_code{0};     // what the failing call returns
std::atomic<int> fault_after{-1};   // calls that succeed before it; if negative, no call fails
std::atomic<int> jitter_us{0};      // longest of the pauses that a stream makes now and then
std::atomic<bool> is_lost{false};   // streams skip all work, as on a GPU that hangs

int Fault() {
  if (fault_after.load() < 0) return 0;
  return fault_after.fetch_sub(1) == 0 ? fault_code.load() : 0;
}

class Stream {
 public:
  Stream() : thread_([this] { Run(); }) {}
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }
  void Add(Work work) {
    if (recording != nullptr) {
      recording->push_back(std::move(work));
      return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    wake_.notify_all();
  }
  void Replay(const std::vector<Work>& works) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.insert(queue_.end(), works.begin(), works.end());
    wake_.notify_all();
  }
  bool Synchronize(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    return idle_.wait_for(lock, std::chrono::duration<double>(seconds),
                          [this] { return queue_.empty() && !is_busy_; });
  }
  std::vector<Work>* recording = nullptr;

 private:
  void Run() {
    std::minstd_rand random(1);
    for (;;) {
      Work work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        is_busy_ = false;
        idle_.notify_all();
        wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        work = std::move(queue_.front());
        queue_.pop_front();
        is_busy_ = true;
      }
      const int jitter = jitter_us.load();
      if (jitter > 0 && random() % 8 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random() % jitter));
      if (!is_lost.load()) work();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::deque<Work> queue_;
  bool is_busy_ = false, stop_ = false;
  std::thread thread_;
};

struct Operation {
  uint32_t operation, unused;
  uint64_t address, value;
  uint32_t flags, more;
  uint64_t alias, padding;
};

std::atomic<uint32_t>& Word(uint64_t address) {
  return *reinterpret_cast<std::atomic<uint32_t>*>(address);
}

void Run(const Operation& operation) {
  if (operation.operation == 2) {
    Word(operation.address).store(static_cast<uint32_t>(operation.value));
    return;
  }
  while (Word(operation.address).load() != static_cast<uint32_t>(operation.value)) {
    if (is_lost.load()) return;
    std::this_thread::yield();
  }
}

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) {
  *version = 12080;
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
int cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned) {
  *device = reinterpret_cast<uint64_t>(host);
  return 0;
}
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  const int fault = Fault();
  if (fault == 0) static_cast<Stream*>(stream)->Add([=] { function(argument); });
  return fault;
}
#ifndef STUB_WITHOUT_MEMORY_OPERATIONS
int cuStreamWriteValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned) {
  const int fault = Fault();
  if (fault == 0) static_cast<Stream*>(stream)->Add([=] { Run({2, 0, address, value}); });
  return fault;
}
int cuStreamBatchMemOp_v2(void* stream, unsigned count, Operation* operations, unsigned) {
  const int fault = Fault();
  if (fault != 0) return fault;
  const std::vector<Operation> all(operations, operations + count);
  for (const Operation& operation : all)
    if (operation.operation == 1 && operation.flags != 1) return 1;  // the link uses only EQ
  static_cast<Stream*>(stream)->Add([=] {
    for (const Operation& operation : all) Run(operation);
  });
  return 0;
}
#endif

void* stub_open_stream() { return new Stream; }
void stub_close_stream(void* stream) { delete static_cast<Stream*>(stream); }
int stub_synchronize(void* stream, double seconds) {
  return static_cast<Stream*>(stream)->Synchronize(seconds);
}
void stub_copy(void* stream, void* to, const void* from, size_t n) {
  static_cast<Stream*>(stream)->Add([=] { std::memcpy(to, from, n); });
}
void stub_fill(void* stream, void* to, int byte, size_t n) {
  static_cast<Stream*>(stream)->Add([=] { std::memset(to, byte, n); });
}
void* stub_record(void* stream) {
  return static_cast<Stream*>(stream)->recording = new std::vector<Work>;
}
void stub_end_record(void* stream) { static_cast<Stream*>(stream)->recording = nullptr; }
void stub_replay(void* stream, void* recording) {
  static_cast<Stream*>(stream)->Replay(*static_cast<std::vector<Work>*>(recording));
}
void stub_free_recording(void* recording) { delete static_cast<std::vector<Work>*>(recording); }
void stub_fail(int after, int code) {
  fault_code.store(code);
  fault_after.store(after);
}
void stub_jitter(int microseconds) { jitter_us.store(microseconds); }
void stub_lose(int lost) { is_lost.store(lost != 0); }

}  // extern "C"
