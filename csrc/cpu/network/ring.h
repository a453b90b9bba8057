// Lines of an image that stream through a chain of stages, and what a chain does to one line.
//
// A tile of the image is worked on in strips, from left to right, and each strip line by line, so that what a stage
// needs of the one before is still in the cache. A stage that looks at pixels around its own lags behind: by as many
// lines as it looks ahead, and by as many columns. So every stage makes `width` new columns of every line, all at the
// same place in its buffer, and nothing is computed twice; the few last columns of a line that the next strip will look
// back at are kept in between.
#pragma once

#include "cpu/tile/matrix.h"
#include "cpu/tile/rows.h"

namespace seemore::SEEMORE_ISA {

// The strip that a chain works on, and the tile it is part of.
struct Strip {
  int64_t height, columns;      // of the image
  int64_t first_row, last_row;  // of the tile and the lines around it that take part: [first_row, last_row)
  int64_t widest;               // of the tile's strips
  Arena* memory;                // for the buffers of the stages; from null, they are only counted
  bool is_last;                 // of the tile's strips
  int64_t begin, width;         // of this strip: a stage without lag makes the columns [begin, begin + width)

  bool has_row(int64_t row) const { return row >= 0 && row < height; }
};

// The last `lines` lines that a stage made, `cells` for each pixel. A stage of lag L has the image's column
// strip.begin + i - L at place i; places from -reach on can be read.
template <class Cell>
class Ring {
 public:
  Ring(const Strip& strip, int64_t lines, int64_t cells, int64_t lag, int64_t reach)
      : strip_(strip),
        lines_(lines),
        cells_(cells),
        lag_(lag),
        edge_(round_up(reach, kWidth)),
        stride_(strip.widest + edge_),
        data_(strip.memory->take<Cell>(lines * cells * stride_ + edge_)),
        zeros_(strip.memory->take<Cell>(cells * stride_ + edge_)),
        edges_(strip.memory->take<Cell>((strip.last_row - strip.first_row) * cells * edge_)) {
    if (zeros_) std::memset(zeros_, 0, (cells * stride_ + edge_) * sizeof(Cell));
  }

  int64_t stride() const { return stride_; }

  // The line to be filled.
  Cell* open(int64_t row) {
    Cell* line = place(row);
    const Cell* edge = kept(row);
    const bool is_first = strip_.begin == 0;
    for (int64_t c = 0; c < cells_ && edge_; ++c) {
      if (is_first) {
        std::memset(line + c * stride_ - edge_, 0, edge_ * sizeof(Cell));
      } else {
        copy(line + c * stride_ - edge_, edge + c * edge_);
      }
    }
    return line;
  }

  // It is filled: clear what lies outside the image, which convolutions see as zero, and keep what the next strip
  // needs.
  void close(int64_t row) {
    Cell* line = place(row);
    const int64_t begin = smaller(larger(lag_ - strip_.begin, 0), strip_.width);
    const int64_t end = larger(begin, smaller(strip_.width, strip_.columns + lag_ - strip_.begin));
    for (int64_t c = 0; c < cells_; ++c) {
      if (begin > 0) std::memset(line + c * stride_, 0, begin * sizeof(Cell));
      if (end < strip_.width) std::memset(line + c * stride_ + end, 0, (strip_.width - end) * sizeof(Cell));
    }
    Cell* edge = kept(row);
    for (int64_t c = 0; c < cells_ && edge_ && !strip_.is_last; ++c) {
      copy(edge + c * edge_, line + c * stride_ + strip_.width - edge_);
    }
  }

  // A line that was filled; zeros above and below the image.
  const Cell* operator[](int64_t row) const { return strip_.has_row(row) ? place(row) : zeros_ + edge_; }

 private:
  Cell* place(int64_t row) const { return data_ + edge_ + row % lines_ * cells_ * stride_; }
  Cell* kept(int64_t row) const { return edges_ + (row - strip_.first_row) * cells_ * edge_; }
  void copy(Cell* to, const Cell* from) {
    for (int64_t i = 0; i < edge_; i += kWidth) std::memcpy(to + i, from + i, sizeof(Vec<float>));
  }

  const Strip& strip_;
  int64_t lines_, cells_, lag_, edge_, stride_;
  Cell *data_, *zeros_, *edges_;
};

}  // namespace seemore::SEEMORE_ISA
