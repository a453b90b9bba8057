// Loops on torch's own threads.
#pragma once

#include <cstdint>

namespace seemore {

// Call body(context, begin, end) for ranges that make up [0, count), in any order and at the same time. Exceptions of
// the body are rethrown here, once all have ended: torch's own loop would lose them.
void parallel_for(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context);

}  // namespace seemore
