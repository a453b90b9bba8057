// Rings of image rows between the stages of a chain.
//
// A band of the image is processed in strips, from left to right, and each strip row by row, so that a stage finds the
// output of the one before in the cache. A stage with a halo lags behind by as many rows and columns. So every stage
// computes `width` new columns of every row, all at the same place of its buffer, and nothing is computed twice; the
// last columns of a row, which are the halo of the next strip, are kept in between. The next strip may be another
// thread's, which is some rows behind.
#pragma once

#include "cpu/tile/matrix.h"
#include "cpu/tile/rows.h"

namespace seemore::SEEMORE_ISA {

// The strip that a thread's chain works on, and its band.
struct Strip {
  int64_t height, columns;      // of the image
  int64_t first_row, last_row;  // of the band with its halo: [first_row, last_row)
  int64_t widest;               // of the band's strips
  Arena* memory;                // for the buffers of the stages; from null, they are only counted
  Arena* edges;                 // for what the band's strips leave to each other
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
        halo_(halo),
        margin_(round_up(halo, kWidth)),
        row_stride_(strip.widest + margin_),
        kept_stride_(cells * halo + kWidth),
        data_(strip.memory->allocate<Cell>(rows * cells * row_stride_ + margin_)),
        zeros_(strip.memory->allocate<Cell>(cells * row_stride_ + margin_)),
        kept_(strip.edges->allocate<Cell>(halo ? (strip.last_row - strip.first_row) * kept_stride_ : 0)) {
    if (zeros_) std::memset(zeros_, 0, (cells * row_stride_ + margin_) * sizeof(Cell));
  }

  int64_t row_stride() const { return row_stride_; }

  // The buffer of a row, to be filled: copies of the halo go beyond it.
  Cell* open(int64_t row) {
    Cell* to = place(row) - halo_;
    const Cell* from = kept(row);
    const bool is_first = strip_.begin == 0;
    for (int64_t c = 0; c < cells_ && halo_; ++c) {
      if (is_first) {
        std::memset(to + c * row_stride_, 0, halo_ * sizeof(Cell));
      } else {
        copy(to + c * row_stride_, from + c * halo_);
      }
    }
    return place(row);
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
    Cell* halo = kept(row);
    for (int64_t c = 0; c < cells_ && halo_ && !strip_.is_last; ++c) {
      copy(halo + c * halo_, to + c * row_stride_ + strip_.width - halo_);
    }
  }

  // A row that was filled; zeros above and below the image.
  const Cell* operator[](int64_t row) const { return strip_.has_row(row) ? place(row) : zeros_ + margin_; }

 private:
  Cell* place(int64_t row) const { return data_ + margin_ + row % rows_ * cells_ * row_stride_; }
  Cell* kept(int64_t row) const { return kept_ + (row - strip_.first_row) * kept_stride_; }
  // Whole vectors: what is behind the halo is overwritten later.
  void copy(Cell* to, const Cell* from) {
    for (int64_t i = 0; i < halo_; i += kWidth) std::memcpy(to + i, from + i, sizeof(Vec<float>));
  }

  const Strip& strip_;
  int64_t rows_, cells_, lag_, halo_, margin_, row_stride_, kept_stride_;
  Cell *data_, *zeros_, *kept_;
};

}  // namespace seemore::SEEMORE_ISA
