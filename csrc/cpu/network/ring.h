// Rings of image rows between the stages of a chain.
//
// A band of the image is processed in strips, from left to right, and each strip row by row, so that a stage finds the
// output of the one before in the cache. A stage with a halo lags behind by as many rows and columns. So every stage
// computes `width` new columns of every row, all at the same place of its buffer, and nothing is computed twice; the
// last columns of a row, which are the halo of the next strip, are kept in between.
#pragma once

#include "cpu/tile/matrix.h"
#include "cpu/tile/rows.h"

namespace seemore::SEEMORE_ISA {

// The strip that a chain works on, and its band.
struct Strip {
  int64_t height, columns;      // of the image
  int64_t first_row, last_row;  // of the band with its halo: [first_row, last_row)
  int64_t widest;               // of the band's strips
  Arena* memory;                // for the buffers of the stages; from null, they are only counted
  bool is_last;                 // of the band's strips
  int64_t begin, width;         // of this strip: a stage without lag computes the columns [begin, begin + width)

  bool has_row(int64_t row) const { return row >= 0 && row < height; }
};

// The last `rows` rows of a stage, `cells` for each pixel. A stage of lag L has the image's column
// strip.begin + i - L at place i; places from -halo on can be read.
template <class Cell>
class Ring {
 public:
  Ring(const Strip& strip, int64_t rows, int64_t cells, int64_t lag, int64_t halo)
      : strip_(strip),
        rows_(rows),
        cells_(cells),
        lag_(lag),
        edge_(round_up(halo, kWidth)),
        row_stride_(strip.widest + edge_),
        data_(strip.memory->allocate<Cell>(rows * cells * row_stride_ + edge_)),
        zeros_(strip.memory->allocate<Cell>(cells * row_stride_ + edge_)),
        edges_(strip.memory->allocate<Cell>((strip.last_row - strip.first_row) * cells * edge_)) {
    if (zeros_) std::memset(zeros_, 0, (cells * row_stride_ + edge_) * sizeof(Cell));
  }

  int64_t row_stride() const { return row_stride_; }

  // The buffer of a row, to be filled.
  Cell* open(int64_t row) {
    Cell* to = place(row);
    const Cell* edge = kept(row);
    const bool is_first = strip_.begin == 0;
    for (int64_t c = 0; c < cells_ && edge_; ++c) {
      if (is_first) {
        std::memset(to + c * row_stride_ - edge_, 0, edge_ * sizeof(Cell));
      } else {
        copy(to + c * row_stride_ - edge_, edge + c * edge_);
      }
    }
    return to;
  }

  // Close a row that was filled: clear what lies outside the image, which is zero to convolutions, and keep the halo of
  // the next strip.
  void close(int64_t row) {
    Cell* to = place(row);
    const int64_t begin = smaller(larger(lag_ - strip_.begin, 0), strip_.width);
    const int64_t end = larger(begin, smaller(strip_.width, strip_.columns + lag_ - strip_.begin));
    for (int64_t c = 0; c < cells_; ++c) {
      if (begin > 0) std::memset(to + c * row_stride_, 0, begin * sizeof(Cell));
      if (end < strip_.width) std::memset(to + c * row_stride_ + end, 0, (strip_.width - end) * sizeof(Cell));
    }
    Cell* edge = kept(row);
    for (int64_t c = 0; c < cells_ && edge_ && !strip_.is_last; ++c) {
      copy(edge + c * edge_, to + c * row_stride_ + strip_.width - edge_);
    }
  }

  // A row that was filled; zeros above and below the image.
  const Cell* operator[](int64_t row) const { return strip_.has_row(row) ? place(row) : zeros_ + edge_; }

 private:
  Cell* place(int64_t row) const { return data_ + edge_ + row % rows_ * cells_ * row_stride_; }
  Cell* kept(int64_t row) const { return edges_ + (row - strip_.first_row) * cells_ * edge_; }
  void copy(Cell* to, const Cell* from) {
    for (int64_t i = 0; i < edge_; i += kWidth) std::memcpy(to + i, from + i, sizeof(Vec<float>));
  }

  const Strip& strip_;
  int64_t rows_, cells_, lag_, edge_, row_stride_;
  Cell *data_, *zeros_, *edges_;
};

}  // namespace seemore::SEEMORE_ISA
