// Loops on torch's own threads.
#pragma once

#include <cstdint>

namespace seemore {

// Call body(context, begin, end) for ranges that make up [0, count), in any order and at the same time. Exceptions of
// the body are rethrown here, once all have ended: torch's own loop would lose them.
void parallel_for(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context);

// The strips of bands of an image, which the threads of a band's team take in their order, where each row of a strip
// waits for the same row of the strip before. Whichever threads there are, and be it one after another, the first
// unfinished strip of a band waits for nothing.
class Wavefront {
 public:
  Wavefront(int64_t teams, int64_t strips);
  ~Wavefront();
  Wavefront(const Wavefront&) = delete;
  Wavefront& operator=(const Wavefront&) = delete;

  // Begin a team's next band; no thread of it is at work.
  void restart(int64_t team);
  // Return the first strip of a team that no thread has taken yet; the number of strips, if there is none.
  int64_t take(int64_t team);
  // Wait until the strip before `strip` has done `rows` rows, and, where that takes a while, some more of at most
  // `all`.
  void wait(int64_t team, int64_t strip, int64_t rows, int64_t all);
  // Say that a strip has done `rows` rows.
  void done(int64_t team, int64_t strip, int64_t rows);

 private:
  struct Rows;
  struct Team;
  int64_t strips_;
  Team* of_team_;
  Rows* of_strip_;
};

}  // namespace seemore
