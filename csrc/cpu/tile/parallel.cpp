#include "cpu/tile/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>

namespace seemore {

void parallel_for(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context) {
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

namespace {

constexpr int64_t kSpins = 64;  // about as long as a thread takes to fall asleep
constexpr int64_t kAhead = 2;   // rows that a strip which had to wait lets the one before advance

}  // namespace

struct Wavefront::Team {
  alignas(64) std::atomic<int64_t> next{0};
};

struct Wavefront::Rows {
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<int64_t> wanted{INT64_MAX};  // by the thread that waits, if one does
  std::mutex mutex;
  std::condition_variable condition;
};

Wavefront::Wavefront(int64_t teams, int64_t strips)
    : strips_(strips), of_team_(new Team[teams]), of_strip_(new Rows[teams * strips]) {}

Wavefront::~Wavefront() {
  delete[] of_strip_;
  delete[] of_team_;
}

void Wavefront::restart(int64_t team) {
  of_team_[team].next = 0;
  for (int64_t strip = 0; strip < strips_; ++strip) of_strip_[team * strips_ + strip].done = 0;
}

int64_t Wavefront::take(int64_t team) {
  const int64_t strip = of_team_[team].next.fetch_add(1);
  return strip < strips_ ? strip : strips_;
}

void Wavefront::wait(int64_t team, int64_t strip, int64_t rows, int64_t all) {
  if (strip == 0) return;
  Rows& before = of_strip_[team * strips_ + strip - 1];
  for (int64_t i = 0; i < kSpins; ++i) {
    if (before.done.load(std::memory_order_acquire) >= rows) return;
  }
  const int64_t wanted = rows + kAhead < all ? rows + kAhead : all;
  std::unique_lock<std::mutex> lock(before.mutex);
  before.wanted = wanted;  // in one order with the other thread's store to `done` and its load of this
  before.condition.wait(lock, [&] { return before.done >= wanted; });
  before.wanted = INT64_MAX;
}

void Wavefront::done(int64_t team, int64_t strip, int64_t rows) {
  Rows& here = of_strip_[team * strips_ + strip];
  here.done = rows;
  if (here.wanted > rows) return;
  const std::lock_guard<std::mutex> lock(here.mutex);
  here.condition.notify_one();
}

}  // namespace seemore
