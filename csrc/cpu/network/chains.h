// Sources of chains (the image, or the experts of a group) and their sinks (the next pool, or pixels).
#pragma once

#include "cpu/network/routing.h"

namespace seemore::SEEMORE_ISA {

// The rows of an image that one sweep computes, and the state that it reads and overwrites.
template <class Cell>
struct Band {
  int64_t image;   // among those processed at a time
  int64_t number;  // of the image in the batch
  int64_t top, bottom;
  State<Cell> state;      // of the image
  State<Cell> halo_rows;  // copies of the `halo` rows above the band and below it, which other sweeps overwrite
  int64_t halo;

  // Whether a row is the band's, or of the image and at most so many rows above or below.
  bool takes_part(int64_t row, int64_t halo_rows, const Strip& strip) const {
    return strip.has_row(row) && row >= top - halo_rows && row < bottom + halo_rows;
  }

  State<Cell> origin_of(int64_t row) const {
    if (row < top) return halo_rows.origin_of(row - top + halo);
    if (row >= bottom) return halo_rows.origin_of(row - bottom + halo);
    return state.origin_of(row);
  }
};

// Call body(0 of the type of the pixels); see Network::max_value.
template <class Body>
inline void with_pixel_type(int64_t max_value, const Body& body) {
  if (max_value == 255) return body(uint8_t());
  if (max_value == 65535) return body(uint16_t());
  body(float());
}

// conv_1 of the image: with the mean subtracted, and zero padding.
class InputConv {
 public:
  InputConv(const Strip& strip, const Network& net, const Matrix<float>& conv, int64_t image, int64_t lag)
      : strip_(strip),
        net_(net),
        conv_(conv),
        image_(image),
        lag_(lag),
        row_stride_(strip.widest + 2),
        rows_buffer_(strip.memory->allocate<float>(3 * net.config.in_channels * row_stride_ + kWidth)) {}

  void make(int64_t row, float* to, int64_t row_stride) const {
    const int64_t channels = net_.config.in_channels;
    for (int64_t y = 0; y < 3; ++y) {
      float* to_row = rows_buffer_ + y * channels * row_stride_;
      with_pixel_type(net_.max_value, [&](auto pixel) { read<decltype(pixel)>(row + y - 1, to_row); });
    }
    Source<float> sources[9];
    for (int64_t s = 0; s < 9; ++s) sources[s] = {rows_buffer_ + s / 3 * channels * row_stride_ + s % 3, row_stride_};
    const int64_t rows = net_.config.channels;
    multiply(conv_, sources, strip_.width, StoreEpilogue<Identity>{{to, to, row_stride, row_stride, rows, rows}});
  }

 private:
  template <class T>
  void read(int64_t row, float* to) const {
    const int64_t channels = net_.config.in_channels, first = strip_.begin - lag_ - 1;
    std::memset(to, 0, channels * row_stride_ * sizeof(float));
    if (!strip_.has_row(row)) return;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width + 2, strip_.columns - first);
    const float divisor = net_.max_value ? static_cast<float>(net_.max_value) : 1.f;
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = address<T>(net_.x, image_, c, row, 0);
      for (int64_t i = begin; i < end; ++i) {
        const float value = static_cast<float>(from[(first + i) * net_.x.column]) / divisor;
        to[c * row_stride_ + i] = (value - net_.mean[c]) * net_.img_range;
      }
    }
  }

  const Strip& strip_;
  const Network& net_;
  const Matrix<float>& conv_;
  int64_t image_, lag_, row_stride_;
  float* rows_buffer_;
};

// The source of the first chain: conv_1 of the image.
template <class Cell>
class HeadSource {
 public:
  HeadSource(const Strip& strip, const Band<Cell>& band, const Network& net, const Matrix<float>& conv, int64_t lag)
      : delay(0), input_conv_(strip, net, conv, band.number, lag) {}
  void step(int64_t) {}
  void make(int64_t row, float* to, int64_t row_stride) const { input_conv_.make(row, to, row_stride); }
  const int64_t delay;  // rows that `make` lags behind `step`

 private:
  InputConv input_conv_;
};

// The source of a later chain: the second half of a group's MoE block, its FFN, SEE and FFN.
template <class Cell>
class GroupSource {
 public:
  GroupSource(const Strip& strip, const Band<Cell>& band, const GroupWeights<Cell>& weights,
              const RoutingState<Cell>& routing, const ColumnTable& up, int64_t channels, int64_t lag)
      : delay(2 + weights.striped_row.count / 2),
        strip_(strip),
        band_(band),
        routing_(routing),
        up_(up),
        channels_(channels),
        lag_(lag),
        project_a_(routing.project_a()),
        mix_(routing.mix()),
        local_ffn_(strip, weights.local_ffn, channels, lag),
        see_(strip, weights, channels, lag + 1),
        global_ffn_(strip, weights.global_ffn, channels, lag + delay - 1),
        rank_a_(strip.memory->allocate<float>(weights.experts.ranks * strip.widest)),
        small_(strip.memory->allocate<float>(routing.map_columns())),
        cells_(strip.memory->allocate<Cell>(cells_of<Cell>(weights.experts.ranks) * strip.widest)) {}

  // Take row `row`; every stage goes as far as that allows.
  void step(int64_t row) {
    const int64_t half = delay - 2;
    if (band_.takes_part(row, 2 + delay, strip_)) {
      mix(row, local_ffn_.open(row), local_ffn_.row_stride());
      local_ffn_.push(row);
    }
    if (band_.takes_part(row - 1, 1 + delay, strip_)) {
      local_ffn_.pull(row - 1, see_.open(row - 1), see_.row_stride());
      see_.push(row - 1);
    }
    if (band_.takes_part(row - 1 - half, 3, strip_)) {
      see_.pull(row - 1 - half, global_ffn_.open(row - 1 - half), global_ffn_.row_stride());
      global_ffn_.push(row - 1 - half);
    }
  }

  void make(int64_t row, float* to, int64_t row_stride) { global_ffn_.pull(row, to, row_stride); }
  const int64_t delay;

 private:
  // x + weight_proj (a + experts(a, k)) + bias_proj, the experts' last matrix folded into the projection
  void mix(int64_t row, float* to, int64_t row_stride) {
    const State<Cell> origin = band_.origin_of(row).from_column(strip_.begin - lag_);
    const Source<Cell> sources[]{{origin.a, origin.row_stride}, {cells_, strip_.widest}};
    const int64_t ranks = routing_.ranks();
    multiply(project_a_, sources, strip_.width,
             StoreEpilogue<Identity>{{rank_a_, rank_a_, strip_.widest, strip_.widest, ranks, ranks}});
    const BilinearPosition position(row, strip_.height, routing_.map_rows());
    const float below_share = static_cast<float>(position.share);
    constexpr int G = kChannels<Cell>;
    const int64_t begin = larger(0, lag_ - strip_.begin);
    for (int64_t r = 0; r < ranks; ++r) {
      const float *above = routing_.small_map(r, position.before), *below = routing_.small_map(r, position.after);
      for (int64_t i = 0; i < routing_.map_columns(); ++i) {
        small_[i] = above[i] * (1.f - below_share) + below[i] * below_share;
      }
      float* product = rank_a_ + r * strip_.widest;
      const float* k = origin.k + routing_.row_of_k(r) * origin.row_stride;
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
    multiply(mix_, sources, strip_.width,
             ResidualEpilogue<Identity>{to, origin.x, row_stride, origin.row_stride, channels_});
  }

  const Strip& strip_;
  const Band<Cell>& band_;
  const RoutingState<Cell>& routing_;
  const ColumnTable& up_;
  int64_t channels_, lag_;
  const Matrix<Cell> project_a_, mix_;
  Ffn<Cell> local_ffn_;
  See<Cell> see_;
  Ffn<Cell> global_ffn_;
  float *rank_a_, *small_;
  Cell* cells_;
};

// The sink at a pool: rows go to the state, and on through the first half of the next group's MoE block.
template <class Cell>
class PoolSink {
 public:
  PoolSink(const Strip& strip, const Band<Cell>& band, const GroupWeights<Cell>& weights, const GroupSums& sums,
           int64_t channels, int64_t lag)
      : strip_(strip),
        band_(band),
        sums_(sums),
        lag_(lag),
        front_(strip, weights, channels, lag),
        spare_(strip.memory->allocate<float>(channels * strip.widest)) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    const bool is_own = band_.takes_part(row, 0, strip_);
    float* to = is_own ? band_.state.origin_of(row).x + strip_.begin - lag_ : spare_;
    const int64_t row_stride = is_own ? band_.state.row_stride : strip_.widest;
    source.make(row, to, row_stride);
    front_.push(row, to, row_stride);
  }
  // Rows `row` and row + 1, those of them that take part.
  void pull(int64_t row) {
    front_.pull(row);
    for (int64_t y = row; y < row + 2; ++y) {
      if (band_.takes_part(y, 1, strip_)) {
        front_.expand(y, y > row, band_.state, sums_, band_.takes_part(y, 0, strip_));
      }
    }
  }
  void finish(int64_t row) {
    for (int64_t y = row; y < row + 2; ++y) {
      if (band_.takes_part(y, 0, strip_)) front_.finish(y, band_.state, sums_);
    }
  }
  bool is_finite() const { return true; }  // known from the pixels only

 private:
  const Strip& strip_;
  const Band<Cell>& band_;
  const GroupSums sums_;
  int64_t lag_;
  MoEFront<Cell> front_;
  float* spare_;
};

// The sink of the last chain: LayerNorm, conv_2, + conv_1(image), upsampler, pixels.
template <class Cell>
class OutputSink {
 public:
  OutputSink(const Strip& strip, const Band<Cell>& band, const Network& net, const NetworkWeights<Cell>& weights,
             int64_t lag)
      : strip_(strip),
        band_(band),
        net_(net),
        lag_(lag),
        conv_2_(strip, weights.norm, weights.conv_2, net.config.channels, lag),
        input_conv_(strip, net, weights.conv_1, band.number, lag + 1),
        y_(strip, 4, net.config.channels, lag + 1, 2),
        upsampler_(strip, weights.upsampler, net.config.channels),
        spare_(strip.memory->allocate<float>(net.config.channels * y_.row_stride())),
        pixels_(strip.memory->allocate<float>(2 * outputs() * strip.widest)) {}

  template <class Source>
  void push(int64_t row, Source& source) {
    source.make(row, spare_, strip_.widest);
    conv_2_.push(row, spare_, strip_.widest);
  }

  // Rows `row` and row + 1, those of them that take part.
  void pull(int64_t row) {
    float* y[2];
    for (int64_t i = 0; i < 2; ++i) {
      const bool takes_part = band_.takes_part(row + i, 1, strip_);
      y[i] = takes_part ? y_.open(row + i) : spare_;
      if (takes_part) input_conv_.make(row + i, y[i], y_.row_stride());
    }
    const int64_t row_stride = y_.row_stride(), channels = net_.config.channels;
    conv_2_.pull(row, ResidualEpilogue<Identity>{y[0], y[0], row_stride, row_stride, channels},
                 ResidualEpilogue<Identity>{y[1], y[1], row_stride, row_stride, channels});
    for (int64_t i = 0; i < 2; ++i) {
      if (band_.takes_part(row + i, 1, strip_)) y_.close(row + i);
    }
  }

  void finish(int64_t row) {
    const int64_t row_stride = strip_.widest;
    float* second = pixels_ + outputs() * row_stride;
    upsampler_(y_, row, StoreEpilogue<Identity>{{pixels_, pixels_, row_stride, row_stride, outputs(), outputs()}},
               StoreEpilogue<Identity>{{second, second, row_stride, row_stride, outputs(), outputs()}});
    for (int64_t y = row; y < row + 2; ++y) {
      if (!band_.takes_part(y, 0, strip_)) continue;
      with_pixel_type(net_.max_value, [&](auto pixel) { write<decltype(pixel)>(y, y > row ? second : pixels_); });
    }
  }

  // Whether all pixels were finite before they were converted to integers.
  bool is_finite() const { return is_finite_; }

 private:
  int64_t outputs() const { return net_.config.in_channels * net_.config.scale * net_.config.scale; }

  static bool are_finite(const float* values, int64_t count) {
    Vec<float> zero{};
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) zero += load(values + i) * 0.f;
    for (; i < count; ++i) zero[0] += values[i] * 0.f;
    return sum_of_lanes<float>(zero) == 0;
  }

  template <class T>
  void write(int64_t row, float* values) {
    constexpr bool is_integer = static_cast<T>(0.5f) == 0;
    const float max_value = static_cast<float>(net_.max_value);
    const int64_t scale = net_.config.scale, first = strip_.begin - lag_ - 2;
    const int64_t begin = larger(0, -first), end = smaller(strip_.width, strip_.columns - first);
    for (int64_t o = 0; o < outputs(); ++o) {
      const int64_t channel = o / (scale * scale), y = o / scale % scale, x = o % scale;
      float* from = values + o * strip_.widest;
      if (is_integer && !are_finite(from + begin, end - begin)) is_finite_ = false;
      for (int64_t i = 0; i < strip_.width; i += kWidth) {
        Vec<float> v = load(from + i) / net_.img_range + net_.mean[channel];
        if (is_integer) v = smaller(larger(v, Vec<float>{}), broadcast(1.f)) * max_value;
        store(from + i, v);
      }
      T* to = address<T>(net_.y, band_.number, channel, row * scale + y, (first + begin) * scale + x);
      const int64_t step = scale * net_.y.column;
      // Rounded to the nearest, ties to even, here: in the loop above, the product would be fused into the sum.
      for (int64_t i = begin; i < end; ++i) {
        to[(i - begin) * step] = static_cast<T>(is_integer ? (from[i] + 12582912.f) - 12582912.f : from[i]);
      }
    }
  }

  const Strip& strip_;
  const Band<Cell>& band_;
  const Network& net_;
  int64_t lag_;
  NormConv<Cell> conv_2_;
  InputConv input_conv_;
  Ring<float> y_;
  Conv3x3<float> upsampler_;
  float *spare_, *pixels_;
  bool is_finite_ = true;
};

}  // namespace seemore::SEEMORE_ISA
