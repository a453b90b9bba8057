// calibrate's gradients on the CPU.
//
// 1. gather: the transposed interpolation, dy -> ds, the gradient of the small map; along columns first, then rows.
// 2. mix: C x C matrix and depthwise 3x3 of a few rows of the small map, all channels.
// 3. descend: from the last aggregation to the sums of the first one, a plane at a time.
// 4. spread: the first aggregation's contribution to dk, and its weights' gradient.

#include "cpu/ops/calibrate_maps.h"
#include "params/calibrate.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kAggregationSums = 16 + 1;

// The maps in `scratch`, of the accumulation type.
template <class A>
struct Scratch {
  Scratch(const Calibrate& in, void* memory)
      : gathered(map_of(size_of_level(in, in.recursive), static_cast<A*>(memory))),
        unmixed(map_of(size_of_level(in, in.recursive), gathered.data + elements_of_level(in, in.recursive))),
        first(map_of(size_of_level(in, 1), unmixed.data + elements_of_level(in, in.recursive))) {}

  Map<A> gathered;  // ds
  Map<A> unmixed;   // of the depthwise convolution's result
  Map<A> first;     // of the first aggregation's sums
};

// Rows [tile.h0, tile.h1) of ds.
template <class T, class A = Accumulate<T>>
void gather(const Calibrate& in, const Image& dy, const Tile& tile, Map<A> gathered, const Axis<A>& rows,
            const Axis<A>& columns, Rows<A>& buffers) {
  const int64_t width = in.size.width, row_stride = round_up(width, kLanes<A>);
  A* const sums = buffers[1];
  for (int64_t i = tile.h0; i < tile.h1; ++i) {
    bool is_first = true;
    for (int64_t h = rows.starts[larger(i - 1, 0)]; h < rows.starts[i + 1]; ++h) {
      const A share = rows.share[h];
      const A weight = (rows.before[h] == i ? 1 - share : A(0)) + (rows.after[h] == i ? share : A(0));
      const Place place{tile.b, tile.c, tile.channels, h, 0, row_stride};
      const A* const from = read_rows<T>(buffers[0], dy, in.size, place, width);
      for (int64_t x = 0; x < tile.channels * row_stride; x += kLanes<A>) {
        const Vec<A> product = weight * load(from + x);
        store(sums + x, is_first ? product : load(sums + x) + product);
      }
      is_first = false;
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      const A* const from = sums + c * row_stride;
      A* const to = gathered.plane(tile.b, tile.c + c) + i * gathered.width;
      A carried = 0;  // from the column before
      for (int64_t j = 0; j < gathered.width; ++j) {
        A before = 0, after = 0;
        for (int64_t x = columns.starts[j]; x < columns.starts[j + 1]; ++x) {
          before += (1 - columns.share[x]) * from[x];
          after += columns.share[x] * from[x];
        }
        const bool is_last = j + 1 == gathered.width;  // there, both are one
        to[j] = carried + (is_last ? before + after : before);
        carried = after;
      }
    }
  }
}

// sums[i][j] = sum over pixels of a[i] * b[j], for rows [first, first + kRowsAtOnce) of a.
template <class A>
inline void multiply_transposed(A* sums, int64_t sums_stride, const A* a, int64_t rows, const A* b, int64_t columns,
                                int64_t stride) {
  for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
    const int64_t some = smaller(kRowsAtOnce, rows - i);
    const A* from[kRowsAtOnce];
    for (int64_t r = 0; r < kRowsAtOnce; ++r) from[r] = a + smaller(i + r, rows - 1) * stride;
    for (int64_t j = 0; j < columns; j += 4) {
      const A* seen[4];
      for (int64_t k = 0; k < 4; ++k) seen[k] = b + smaller(j + k, columns - 1) * stride;
      Vec<A> sum[kRowsAtOnce][4] = {};
      for (int64_t x = 0; x < stride; x += kLanes<A>) {
        Vec<A> v[4];
        for (int k = 0; k < 4; ++k) v[k] = load(seen[k] + x);
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const Vec<A> d = load(from[r] + x);
          for (int k = 0; k < 4; ++k) sum[r][k] += d * v[k];
        }
      }
      for (int64_t r = 0; r < some; ++r) {
        for (int64_t k = 0; k < smaller(4, columns - j); ++k) {
          sums[(i + r) * sums_stride + j + k] = sum_of_lanes<A>(sum[r][k]);
        }
      }
    }
  }
}

// Rows [first, last) of an image's small map. `partial`: for each channel, the sums of weight_pw, bias_pw, weight_dw
// and bias_dw.
template <class T, class A = Accumulate<T>>
void mix_backward(const CalibrateParameters<T>& parameters, Map<const A> activated, const Scratch<A>& scratch,
                  int64_t b, int64_t first, int64_t last, A* partial) {
  const int64_t channels = parameters.channels, columns = channels + 1 + 9 + 1, width = activated.width;
  const int64_t pixels = (last - first) * width, row_stride = round_up(pixels, kLanes<A>);
  Buffer<A> seen(channels * 9 * row_stride), depth(channels * row_stride), ds(channels * row_stride),
      result(parameters.rows * row_stride);
  for (int64_t c = 0; c < channels; ++c) {
    A* const seen_taps = seen + c * 9 * row_stride;
    gather_taps<A>(seen_taps, row_stride, activated.plane(b, c), activated.height, width, first, last);
    depthwise<1, A>(depth + c * row_stride, seen_taps, row_stride, parameters.dw + c * 9, parameters.bias_dw[c],
                    row_stride);
    A* const d = ds + c * row_stride;
    std::memcpy(d, scratch.gathered.plane(b, c) + first * width, pixels * sizeof(A));
    for (int64_t i = pixels; i < row_stride; ++i) d[i] = depth[c * row_stride + i] = 0;
    partial[c * columns + channels] = sum_of_lanes<A>(row_sum<A>(d, row_stride));
  }
  multiply_transposed<A>(partial, columns, ds, channels, depth, channels, row_stride);
  multiply_rows<A>(result, ds, row_stride, parameters.pw_transposed, nullptr, parameters.rows, channels, row_stride);
  for (int64_t c = 0; c < channels; ++c) {
    const A* const d = result + c * row_stride;
    std::memcpy(scratch.unmixed.plane(b, c) + first * width, d, pixels * sizeof(A));
    A* const sums = partial + c * columns + channels + 1;
    multiply_transposed<A>(sums, 0, d, 1, seen + c * 9 * row_stride, 9, row_stride);
    sums[9] = sum_of_lanes<A>(row_sum<A>(d, row_stride));
  }
}

// Sums of the 4x4 weights' gradients: of row i, those of all pixels that a vector's lanes meet.
template <class A>
struct AggregationSums {
  void add(int64_t i, int64_t x, Vec<A> product) { lanes[i][x / kLanes<A> % kPhases<A>] += product; }
  void write(A* to) const {
    for (int64_t i = 0; i < 4; ++i) {
      double sums[4] = {};
      for (int64_t n = 0; n < kPhases<A> * kLanes<A>; ++n) sums[n % 4] += lanes[i][n / kLanes<A>][n % kLanes<A>];
      for (int64_t j = 0; j < 4; ++j) to[4 * i + j] = sums[j];
    }
  }

  Vec<A> lanes[4][kPhases<A>] = {};
};

// The gradients of a plane's aggregations, from behind the last one's GELU to the first one's sums.
template <class T, class A = Accumulate<T>>
void descend(const Calibrate& in, const CalibrateParameters<T>& parameters, const void* maps, const Scratch<A>& scratch,
             int64_t b, int64_t c, A* partial) {
  const Map<const A> last = level_of<const A>(in, maps, in.recursive);
  const Map<A> one = scratch.first;
  const int64_t pixels = last.pixels(), row_stride = round_up(pixels, kLanes<A>), wide = round_up(one.width, kLanes<A>);
  Buffer<A> seen(9 * row_stride), d(one.pixels() + wide), above(one.pixels() / 16 + wide), pre(row_stride);
  Rows<A> repeated(1, wide), row(1, wide);
  gather_taps<A>(seen, row_stride, scratch.unmixed.plane(b, c), last.height, last.width, 0, last.height);
  A *now = in.recursive % 2 ? d : above, *next = in.recursive % 2 ? above : d;  // it ends in d, which is the larger one
  depthwise<-1, A>(now, seen, row_stride, parameters.dw + c * 9, A(0), row_stride);
  std::memcpy(pre, last.plane(b, c), pixels * sizeof(A));
  for (int64_t i = pixels; i < row_stride; ++i) pre[i] = 0;
  double bias = 0;
  for (int64_t i = 0; i < row_stride; i += kLanes<A>) {
    const Vec<A> x = load(pre + i);
    const Normal<A> n = normal(x);
    store(now + i, load(now + i) * (n.distribution + x * n.density));
  }
  for (int64_t i = 0; i < pixels; ++i) bias += now[i];

  AggregationSums<A> sums;
  for (int64_t level = in.recursive; level > 1; --level) {
    const Map<const A> small = level_of<const A>(in, maps, level), large = level_of<const A>(in, maps, level - 1);
    for (int64_t y = 0; y < small.height; ++y) {
      repeat_fourfold(repeated[0], now + y * small.width, small.width);
      for (int64_t i = 0; i < 4; ++i) {
        A* const to = next + (4 * y + i) * large.width;  // vectors go beyond, where the next row will be
        std::memcpy(row[0], large.plane(b, c) + (4 * y + i) * large.width, large.width * sizeof(A));
        Vec<A> total{};
        for (int64_t x = 0; x < large.width; x += kLanes<A>) {
          const Vec<A> s = load(row[0] + x), upstream = load(repeated[0] + x);
          const Normal<A> n = normal(s);
          sums.add(i, x, upstream * (s * n.distribution));
          const Vec<A> ds = parameters.aggregate(c, i, x) * upstream * (n.distribution + s * n.density);
          total += ds;
          store(to + x, ds);
        }
        bias += sum_of_lanes<A>(total);
      }
    }
    A* const filled = next;
    next = now, now = filled;
  }
  std::memcpy(one.plane(b, c), now, one.pixels() * sizeof(A));
  sums.write(partial);
  partial[16] = bias;
}

// Rows of dk that rows [tile.h0, tile.h1) of the first aggregation cover; the last tile has the uncovered ones, too.
template <class T, class A = Accumulate<T>>
void spread(const Calibrate& in, const CalibrateParameters<T>& parameters, const Image& dy, const Image& dk,
            const Tile& tile, Map<A> one, A* partial, Rows<A>& buffers) {
  const int64_t width = in.size.width, seen = 4 * one.width, row_stride = round_up(width, kLanes<A>);
  const Size seen_size{in.size.batch, in.size.channels, in.size.height, seen};
  Buffer<AggregationSums<A>> sums(tile.channels);
  for (int64_t c = 0; c < tile.channels; ++c) sums[c] = {};
  const int64_t last = tile.h1 == one.height ? in.size.height : 4 * tile.h1;
  for (int64_t h = 4 * tile.h0; h < last; ++h) {
    const bool is_seen = h < 4 * one.height;
    const Place place{tile.b, tile.c, tile.channels, h, 0, row_stride};
    const A* const d = read_rows<T>(buffers[0], dy, in.size, place, width);
    if (is_seen) {
      const A* const k = read_rows<T>(buffers[1], in.k, seen_size, place, round_up(seen, kLanes<A>));
      for (int64_t c = 0; c < tile.channels; ++c) {
        A *const upstream = buffers[2] + c * row_stride, *const to = buffers[3] + c * row_stride;
        if (h % 4 == 0) repeat_fourfold(upstream, one.plane(tile.b, tile.c + c) + h / 4 * one.width, one.width);
        for (int64_t x = 0; x < seen; x += kLanes<A>) {
          const Vec<A> v = load(upstream + x);
          sums[c].add(h % 4, x, v * load(k + c * row_stride + x));
          store(to + x, v * parameters.aggregate(tile.c + c, h % 4, x));
        }
        for (int64_t x = seen; x < row_stride; ++x) to[x] = 0;
      }
    }
    const A* const add = buffers[3];
    store_rows<T>(dk, place, buffers[4], width,
                  [=](Vec<A>, int64_t i) { return is_seen ? load(d + i) + load(add + i) : load(d + i); });
  }
  for (int64_t c = 0; c < tile.channels; ++c) {
    sums[c].write(partial + c * kAggregationSums);
    partial[c * kAggregationSums + 16] = 0;  // descend has it
  }
}

// Of each image, the sums of descend, and those of spread's tiles.
int64_t aggregation_parts(const Calibrate& in) {
  return 1 + calibrate_tiling(in, size_of_level(in, 1).height).parts_of_image();
}

}  // namespace

CalibrateWorkspace calibrate_workspace(const Calibrate& in) {
  return {in.size.batch * aggregation_parts(in), MixParts(in).count(),
          2 * elements_of_level(in, in.recursive) + elements_of_level(in, 1)};
}

void calibrate_backward(const Calibrate& in, const CalibrateGradients& grad, void*) {
  const Size& size = in.size;
  if (size.batch == 0 || size.channels == 0) return;
  with_type(in.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    using A = Accumulate<T>;
    const CalibrateParameters<T> parameters(in);
    const Scratch<A> scratch(in, grad.scratch);
    const Axis<A> rows(size.height, scratch.gathered.height), columns(size.width, scratch.gathered.width);
    const Tiling gathering = calibrate_tiling(in, scratch.gathered.height);
    for_each_calibrated<A>(gathering, 2, [&](const Tile& tile, Rows<A>& buffers) {
      gather<T, A>(in, grad.dy, tile, scratch.gathered, rows, columns, buffers);
    });

    const Map<const A> activated = level_of<const A>(in, grad.maps, in.recursive + 1);
    const MixParts parts(in);
    for_each_task(parts.count(), [&](int64_t i) {
      const int64_t first = i % parts.bands * parts.rows, last = smaller(first + parts.rows, parts.height);
      A* const partial = static_cast<A*>(grad.partial_mix) + i * size.channels * (size.channels + 11);
      mix_backward<T, A>(parameters, activated, scratch, i / parts.bands, first, last, partial);
    });

    const auto partial_of = [&](int64_t b, int64_t part, int64_t c) {
      const int64_t place = (b * aggregation_parts(in) + part) * size.channels + c;
      return static_cast<A*>(grad.partial_agg) + place * kAggregationSums;
    };
    for_each_task(size.batch * size.channels, [&](int64_t i) {
      const int64_t b = i / size.channels, c = i % size.channels;
      descend<T, A>(in, parameters, grad.maps, scratch, b, c, partial_of(b, 0, c));
    });

    const Tiling tiling = calibrate_tiling(in, scratch.first.height);
    for_each_calibrated<A>(tiling, 5, [&](const Tile& tile, Rows<A>& buffers) {
      A* const partial = partial_of(tile.b, 1 + tiling.part_of_image(tile), tile.c);
      spread<T, A>(in, parameters, grad.dy, grad.dk, tile, scratch.first, partial, buffers);
    });
  });
}

}  // namespace seemore::SEEMORE_ISA
