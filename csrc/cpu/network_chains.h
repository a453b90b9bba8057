// Where chains begin (the image, or the experts of a group) and where they end (the next pool, or pixels).
#pragma once

#include "network_routes.h"

namespace seemore::SEEMORE_ISA {

// The lines of an image that one sweep makes, and where it reads what was made before.
template <class Cell>
struct Band {
  int64_t image, top, bottom;
  State<Cell> state;   // of the image
  State<Cell> frames;  // copies of the `around` lines above the band and below it, which other sweeps overwrite
  int64_t around;

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
      : strip_(strip), net_(net), conv_(conv), image_(image), lag_(lag), stride_(strip.widest + 2),
        lines_(3 * net.config.in_channels * stride_ + kWidth) {}

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
  Buffer<float> lines_;
};

// The head of the network: the line of features that begins everything.
template <class Cell>
class Head {
 public:
  Head(const Strip& strip, const Band<Cell>& band, const Network& net, const Matrix<float>& conv, int64_t lag)
      : delay(0), first_(strip, net, conv, band.image, lag) {}
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
        rank_a_(route.ranks() * strip.widest),
        small_(route.map_columns()),
        cells_(cells_of<Cell>(route.ranks()) * strip.widest) {}

  // Take the line `row`; every stage goes as far as that allows.
  void step(int64_t row) {
    const int64_t half = delay - 2;
    if (takes_part(row, 2 + delay)) {
      mix(row, local_ffn_.open(row), local_ffn_.stride());
      local_ffn_.push(row);
    }
    if (takes_part(row - 1, 1 + delay)) {
      local_ffn_.pull(row - 1, see_.open(row - 1), see_.stride());
      see_.push(row - 1);
    }
    if (takes_part(row - 1 - half, 3)) {
      see_.pull(row - 1 - half, global_ffn_.open(row - 1 - half), global_ffn_.stride());
      global_ffn_.push(row - 1 - half);
    }
  }

  void make(int64_t row, float* to, int64_t stride) { global_ffn_.pull(row, to, stride); }
  const int64_t delay;

 private:
  bool takes_part(int64_t row, int64_t around) const {
    return strip_.has_row(row) && row >= band_.top - around && row < band_.bottom + around;
  }

  // x + weight_proj (a + experts(a, k)) + bias_proj, the experts' last matrix folded into the projection
  void mix(int64_t row, float* to, int64_t stride) {
    State<Cell> line = band_.line(row);
    line.x += strip_.begin - lag_, line.a += strip_.begin - lag_, line.k += strip_.begin - lag_;
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
  Buffer<float> rank_a_, small_;
  Buffer<Cell> cells_;
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
        spare_(channels * strip.widest) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    const bool is_own = row >= band_.top && row < band_.bottom;
    float* to = is_own ? band_.state.at(row).x + strip_.begin - lag_ : spare_;
    const int64_t stride = is_own ? band_.state.stride : strip_.widest;
    source.make(row, to, stride);
    local_.push(row, to, stride);
  }
  void pull(int64_t row) { local_.pull(row, band_.state, pooled_, row >= band_.top && row < band_.bottom); }
  void finish(int64_t row, int64_t strip) { local_.finish(row, band_.state, pooled_, strip); }

 private:
  const Strip& strip_;
  const Band<Cell>& band_;
  const Pooled pooled_;
  int64_t lag_;
  Local<Cell> local_;
  Buffer<float> spare_;
};

// The tail of the network: LayerNorm, conv_2, + conv_1(image), upsampler, and the pixels where they belong.
template <class Cell>
class Tail {
 public:
  Tail(const Strip& strip, const Band<Cell>& band, const Network& net, const NetworkWeights<Cell>& weights, int64_t lag)
      : strip_(strip),
        net_(net),
        weights_(weights),
        image_(band.image),
        lag_(lag),
        conv_2_(strip, weights.norm, weights.conv_2, net.config.channels, lag),
        first_(strip, net, weights.conv_1, band.image, lag + 1),
        y_(strip, 3, net.config.channels, lag + 1, 2),
        spare_(net.config.channels * strip.widest),
        pixels_(outputs() * strip.widest) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    source.make(row, spare_, strip_.widest);
    conv_2_.push(row, spare_, strip_.widest);
  }

  void pull(int64_t row) {
    float* y = y_.open(row);
    first_.make(row, y, y_.stride());
    conv_2_.pull(row, Add<false>{y, y, y_.stride(), y_.stride(), net_.config.channels});
    y_.close(row);
  }

  void finish(int64_t row, int64_t) {
    const Lines lines{pixels_, pixels_, strip_.widest, strip_.widest, outputs(), outputs()};
    multiply(weights_.upsampler, Sources3x3<float>(y_, row).all, strip_.width, Keep<false>{lines});
    if (net_.whole == 255) return write<uint8_t>(row);
    if (net_.whole == 65535) return write<uint16_t>(row);
    write<float>(row);
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
  void write(int64_t row) {
    const int64_t scale = net_.config.scale, first = strip_.begin - lag_ - 2;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, strip_.columns - first);
    for (int64_t o = 0; o < outputs(); ++o) {
      const int64_t channel = o / (scale * scale), y = o / scale % scale, x = o % scale;
      float* line = pixels_ + o * strip_.widest;
      if (net_.whole && !are_finite(line + begin, end - begin)) is_finite_ = false;
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        Vec<float> v = load(line + i) / net_.img_range + net_.mean[channel];
        if (net_.whole) {
          const float whole = static_cast<float>(net_.whole);
          v = smaller(larger(v, Vec<float>{}), broadcast(1.f)) * whole;
          v = (v + 12582912.f) - 12582912.f;  // to the nearest, ties to even
        }
        store(line + i, v);
      }
      T* to = at<T>(net_.y, image_, channel, row * scale + y, (first + begin) * scale + x);
      const int64_t step = scale * net_.y.column;
      for (int64_t i = begin; i < end; ++i) to[(i - begin) * step] = static_cast<T>(line[i]);
    }
  }

  const Strip& strip_;
  const Network& net_;
  const NetworkWeights<Cell>& weights_;
  int64_t image_, lag_;
  NormConv<Cell> conv_2_;
  First first_;
  Ring<float> y_;
  Buffer<float> spare_, pixels_;
  bool is_finite_ = true;
};

}  // namespace seemore::SEEMORE_ISA
