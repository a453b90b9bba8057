// Where chains begin (the image, or the experts of a group) and where they end (the next pool, or pixels).
#pragma once

#include "cpu/network/routing.h"

namespace seemore::SEEMORE_ISA {

// The lines of an image that one sweep makes, and where it reads what was made before.
template <class Cell>
struct Band {
  int64_t image;   // of those that are worked on at a time
  int64_t number;  // of the image in the batch
  int64_t top, bottom;
  State<Cell> state;   // of the image
  State<Cell> frames;  // copies of the `around` lines above the band and below it, which other sweeps overwrite
  int64_t around;

  // Whether a line is the band's, or of the image and at most so many lines above or below.
  bool takes_part(int64_t row, int64_t lines, const Strip& strip) const {
    return strip.has_row(row) && row >= top - lines && row < bottom + lines;
  }

  State<Cell> line(int64_t row) const {
    if (row < top) return frames.at(row - top + around);
    if (row >= bottom) return frames.at(row - bottom + around);
    return state.at(row);
  }
};

// conv_1 of the image itself: with the mean subtracted, and zeros around.
class First {
 public:
  First(const Strip& strip, const Network& net, const Matrix<float>& conv, int64_t image, int64_t lag)
      : strip_(strip),
        net_(net),
        conv_(conv),
        image_(image),
        lag_(lag),
        stride_(strip.widest + 2),
        lines_(strip.memory->take<float>(3 * net.config.in_channels * stride_ + kWidth)) {}

  void make(int64_t row, float* to, int64_t stride) const {
    const int64_t channels = net_.config.in_channels;
    for (int64_t y = 0; y < 3; ++y) {
      float* line = lines_ + y * channels * stride_;
      if (net_.whole == 255) {
        read<uint8_t>(row + y - 1, line);
      } else if (net_.whole == 65535) {
        read<uint16_t>(row + y - 1, line);
      } else {
        read<float>(row + y - 1, line);
      }
    }
    Source<float> sources[9];
    for (int64_t s = 0; s < 9; ++s) sources[s] = {lines_ + s / 3 * channels * stride_ + s % 3, stride_};
    const int64_t rows = net_.config.channels;
    multiply(conv_, sources, strip_.width, Keep<false>{{to, to, stride, stride, rows, rows}});
  }

 private:
  template <class T>
  void read(int64_t row, float* to) const {
    const int64_t channels = net_.config.in_channels, first = strip_.begin - lag_ - 1;
    std::memset(to, 0, channels * stride_ * sizeof(float));
    if (!strip_.has_row(row)) return;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width + 2, strip_.columns - first);
    const float divisor = net_.whole ? static_cast<float>(net_.whole) : 1.f;
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = at<T>(net_.x, image_, c, row, 0);
      for (int64_t i = begin; i < end; ++i) {
        const float value = static_cast<float>(from[(first + i) * net_.x.column]) / divisor;
        to[c * stride_ + i] = (value - net_.mean[c]) * net_.img_range;
      }
    }
  }

  const Strip& strip_;
  const Network& net_;
  const Matrix<float>& conv_;
  int64_t image_, lag_, stride_;
  float* lines_;
};

// The head of the network: the line of features that begins everything.
template <class Cell>
class Head {
 public:
  Head(const Strip& strip, const Band<Cell>& band, const Network& net, const Matrix<float>& conv, int64_t lag)
      : delay(0), first_(strip, net, conv, band.number, lag) {}
  void step(int64_t) {}
  void make(int64_t row, float* to, int64_t stride) const { first_.make(row, to, stride); }
  const int64_t delay;  // lines that `make` lags behind `step`

 private:
  First first_;
};

// The second half of a group's MoE block, its FFN, SEE and FFN.
template <class Cell>
class Group {
 public:
  Group(const Strip& strip, const Band<Cell>& band, const GroupWeights<Cell>& weights, const Route<Cell>& route,
        const ColumnTable& up, int64_t channels, int64_t lag)
      : delay(2 + weights.striped_row.count / 2),
        strip_(strip),
        band_(band),
        route_(route),
        up_(up),
        channels_(channels),
        lag_(lag),
        project_a_(route.project_a()),
        mix_(route.mix()),
        local_ffn_(strip, weights.local_ffn, channels, lag),
        see_(strip, weights, channels, lag + 1),
        global_ffn_(strip, weights.global_ffn, channels, lag + delay - 1),
        rank_a_(strip.memory->take<float>(weights.experts.ranks * strip.widest)),
        small_(strip.memory->take<float>(route.map_columns())),
        cells_(strip.memory->take<Cell>(cells_of<Cell>(weights.experts.ranks) * strip.widest)) {}

  // Take the line `row`; every stage goes as far as that allows.
  void step(int64_t row) {
    const int64_t half = delay - 2;
    if (band_.takes_part(row, 2 + delay, strip_)) {
      mix(row, local_ffn_.open(row), local_ffn_.stride());
      local_ffn_.push(row);
    }
    if (band_.takes_part(row - 1, 1 + delay, strip_)) {
      local_ffn_.pull(row - 1, see_.open(row - 1), see_.stride());
      see_.push(row - 1);
    }
    if (band_.takes_part(row - 1 - half, 3, strip_)) {
      see_.pull(row - 1 - half, global_ffn_.open(row - 1 - half), global_ffn_.stride());
      global_ffn_.push(row - 1 - half);
    }
  }

  void make(int64_t row, float* to, int64_t stride) { global_ffn_.pull(row, to, stride); }
  const int64_t delay;

 private:
  // x + weight_proj (a + experts(a, k)) + bias_proj, the experts' last matrix folded into the projection
  void mix(int64_t row, float* to, int64_t stride) {
    const State<Cell> line = band_.line(row).from_column(strip_.begin - lag_);
    const Source<Cell> sources[]{{line.a, line.stride}, {cells_, strip_.widest}};
    const int64_t ranks = route_.ranks();
    multiply(project_a_, sources, strip_.width,
             Keep<false>{{rank_a_, rank_a_, strip_.widest, strip_.widest, ranks, ranks}});
    const ColumnTable::Position at(row, strip_.height, route_.map_rows());
    constexpr int G = kChannels<Cell>;
    const int64_t begin = larger(0, lag_ - strip_.begin);
    for (int64_t r = 0; r < ranks; ++r) {
      const float *above = route_.small_map(r, at.first), *below = route_.small_map(r, at.second);
      for (int64_t i = 0; i < route_.map_columns(); ++i) {
        small_[i] = above[i] * (1.f - at.share) + below[i] * at.share;
      }
      float* product = rank_a_ + r * strip_.widest;
      const float* k = line.k + route_.row_of_k(r) * line.stride;
      const int64_t first = strip_.begin - lag_;
      for (int64_t i = begin; i < strip_.width; ++i) {
        const float share = up_.share[first + i];
        product[i] *= k[i] + (small_[up_.left[first + i]] * (1.f - share) + small_[up_.right[first + i]] * share);
      }
    }
    for (int64_t r = 0; r < ranks; r += G) {
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        Vec<float> y[G];
        for (int g = 0; g < G; ++g) y[g] = load(rank_a_ + (r + g) * strip_.widest + i);
        store_cells(cells_ + r / G * strip_.widest + i, y);
      }
    }
    multiply(mix_, sources, strip_.width, Add<false>{to, line.x, stride, line.stride, channels_});
  }

  const Strip& strip_;
  const Band<Cell>& band_;
  const Route<Cell>& route_;
  const ColumnTable& up_;
  int64_t channels_, lag_;
  const Matrix<Cell> project_a_, mix_;
  Ffn<Cell> local_ffn_;
  See<Cell> see_;
  Ffn<Cell> global_ffn_;
  float *rank_a_, *small_;
  Cell* cells_;
};

// The end of a group's chain: its lines go to the state, and on through half of the next group's MoE block.
template <class Cell>
class Pool {
 public:
  Pool(const Strip& strip, const Band<Cell>& band, const GroupWeights<Cell>& weights, const Pooled& pooled,
       int64_t channels, int64_t lag)
      : strip_(strip),
        band_(band),
        pooled_(pooled),
        lag_(lag),
        local_(strip, weights, channels, lag),
        spare_(strip.memory->take<float>(channels * strip.widest)) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    const bool is_own = band_.takes_part(row, 0, strip_);
    float* to = is_own ? band_.state.at(row).x + strip_.begin - lag_ : spare_;
    const int64_t stride = is_own ? band_.state.stride : strip_.widest;
    source.make(row, to, stride);
    local_.push(row, to, stride);
  }
  // Lines `row` and row + 1, those of them that take part.
  void pull(int64_t row) {
    local_.pull(row);
    for (int64_t y = row; y < row + 2; ++y) {
      if (band_.takes_part(y, 1, strip_)) {
        local_.expand(y, y > row, band_.state, pooled_, band_.takes_part(y, 0, strip_));
      }
    }
  }
  void finish(int64_t row, int64_t strip) {
    for (int64_t y = row; y < row + 2; ++y) {
      if (band_.takes_part(y, 0, strip_)) local_.finish(y, band_.state, pooled_, strip);
    }
  }
  bool is_finite() const { return true; }  // not asked before the pixels

 private:
  const Strip& strip_;
  const Band<Cell>& band_;
  const Pooled pooled_;
  int64_t lag_;
  Local<Cell> local_;
  float* spare_;
};

// The tail of the network: LayerNorm, conv_2, + conv_1(image), upsampler, and the pixels where they belong.
template <class Cell>
class Tail {
 public:
  Tail(const Strip& strip, const Band<Cell>& band, const Network& net, const NetworkWeights<Cell>& weights, int64_t lag)
      : strip_(strip),
        band_(band),
        net_(net),
        lag_(lag),
        conv_2_(strip, weights.norm, weights.conv_2, net.config.channels, lag),
        first_(strip, net, weights.conv_1, band.number, lag + 1),
        y_(strip, 4, net.config.channels, lag + 1, 2),
        upsampler_(strip, weights.upsampler, net.config.channels),
        spare_(strip.memory->take<float>(net.config.channels * y_.stride())),
        pixels_(strip.memory->take<float>(2 * outputs() * strip.widest)) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    source.make(row, spare_, strip_.widest);
    conv_2_.push(row, spare_, strip_.widest);
  }

  // Lines `row` and row + 1, those of them that take part.
  void pull(int64_t row) {
    float* y[2];
    for (int64_t i = 0; i < 2; ++i) {
      const bool takes_part = band_.takes_part(row + i, 1, strip_);
      y[i] = takes_part ? y_.open(row + i) : spare_;
      if (takes_part) first_.make(row + i, y[i], y_.stride());
    }
    const int64_t stride = y_.stride(), channels = net_.config.channels;
    conv_2_.pull(row, Add<false>{y[0], y[0], stride, stride, channels},
                 Add<false>{y[1], y[1], stride, stride, channels});
    for (int64_t i = 0; i < 2; ++i) {
      if (band_.takes_part(row + i, 1, strip_)) y_.close(row + i);
    }
  }

  void finish(int64_t row, int64_t) {
    const int64_t stride = strip_.widest;
    float* second = pixels_ + outputs() * stride;
    upsampler_(y_, row, Keep<false>{{pixels_, pixels_, stride, stride, outputs(), outputs()}},
               Keep<false>{{second, second, stride, stride, outputs(), outputs()}});
    for (int64_t y = row; y < row + 2; ++y) {
      if (!band_.takes_part(y, 0, strip_)) continue;
      float* lines = y > row ? second : pixels_;
      if (net_.whole == 255) {
        write<uint8_t>(y, lines);
      } else if (net_.whole == 65535) {
        write<uint16_t>(y, lines);
      } else {
        write<float>(y, lines);
      }
    }
  }

  // Whether all pixels were numbers: integers cannot tell.
  bool is_finite() const { return is_finite_; }

 private:
  int64_t outputs() const { return net_.config.in_channels * net_.config.scale * net_.config.scale; }

  static bool are_finite(const float* line, int64_t count) {
    Vec<float> zero{};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) zero += load(line + i) * 0.f;
    for (; i < count; ++i) zero[0] += line[i] * 0.f;
    return sum_of_lanes<float>(zero) == 0;
  }

  template <class T>
  void write(int64_t row, float* lines) {
    constexpr bool is_integer = static_cast<T>(0.5f) == 0;
    const float whole = static_cast<float>(net_.whole);
    const int64_t scale = net_.config.scale, first = strip_.begin - lag_ - 2;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, strip_.columns - first);
    for (int64_t o = 0; o < outputs(); ++o) {
      const int64_t channel = o / (scale * scale), y = o / scale % scale, x = o % scale;
      float* line = lines + o * strip_.widest;
      if (is_integer && !are_finite(line + begin, end - begin)) is_finite_ = false;
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        Vec<float> v = load(line + i) / net_.img_range + net_.mean[channel];
        if (is_integer) v = smaller(larger(v, Vec<float>{}), broadcast(1.f)) * whole;
        store(line + i, v);
      }
      T* to = at<T>(net_.y, band_.number, channel, row * scale + y, (first + begin) * scale + x);
      const int64_t step = scale * net_.y.column;
      // Rounded to the nearest, ties to even, here: in the loop above, the product would be fused into the sum.
      for (int64_t i = begin; i < end; ++i) {
        to[(i - begin) * step] = static_cast<T>(is_integer ? (line[i] + 12582912.f) - 12582912.f : line[i]);
      }
    }
  }

  const Strip& strip_;
  const Band<Cell>& band_;
  const Network& net_;
  int64_t lag_;
  NormConv<Cell> conv_2_;
  First first_;
  Ring<float> y_;
  Conv3x3<float> upsampler_;
  float *spare_, *pixels_;
  bool is_finite_ = true;
};

}  // namespace seemore::SEEMORE_ISA
