// The whole network for inference: one sweep over the image between two global pools.
//
//   head    conv_1(image)                          -> first half of group 0's MoE block
//   middle  experts, FFN, SEE, FFN of group g      -> first half of group g + 1's MoE block
//   tail    experts, FFN, SEE, FFN of the last one -> conv_2, + conv_1(image), upsampler, pixels
//
// A sweep overwrites the state in place, by bands of rows and, in a band, strips of columns from left to right. The
// halo rows of a band are copied before, and computed again by each of two neighbours; a strip finds its halo columns
// with the strip before. So threads share bands as far as the image is wide enough (`divide`): each takes a strip and
// follows the thread on its left some rows behind.
//
// Where the state is larger than the memory, all but its beginning lies in a mapped file: bands are then so low that
// one of each thread fits, and are released once they are done.

#include "cpu/network/chains.h"
#include "cpu/network/pages.h"
#include "cpu/tile/parallel.h"
#include "params/network.h"

namespace seemore::SEEMORE_ISA {
namespace {

constexpr int64_t kStripWidth = 128;  // columns whose rows of all stages stay in the second-level cache
constexpr int64_t kStripCost = 5;     // columns: the halo that a strip takes over from the one before
constexpr int64_t kStripTile = kTileVectors == 2 ? 2 * kWidth : kWidth;  // columns of a register tile

template <class Body>
void for_each(int64_t count, const Body& body) {
  parallel_for(
      count,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
      },
      &body);
}

constexpr int64_t parts(int64_t whole, int64_t most) { return (whole + most - 1) / most; }

// The division of images among threads, and the lags of stages. Results do not depend on it.
struct Plan {
  Plan(const Network& net, int64_t batch)
      : half(net.config.taps / 2),
        start((4 - (3 + half) % 4) % 4),
        halo(4 + half),
        columns(round_up(net.size.width + start + halo, kStripTile)),
        row_stride(round_up(columns + halo, 16)),
        summed_parts(larger(1, columns / kSummedColumns)) {
    const int64_t height = net.size.height;
    double least = INFINITY;
    for (int64_t i = 1; i <= smaller(batch, net.threads); ++i) {
      for (int64_t n = 1; n <= smaller(net.threads / i, net.resident_rows ? 1 : columns / kStripTile); ++n) {
        const int64_t of_image = strips_of(n), count = larger(1, smaller(net.threads / i / n, height / 4));
        if (of_image > columns / kStripTile) continue;
        const double cost = parts(batch, i) * cost_of(height, count, n, of_image);
        if (cost < least) least = cost, images = i, teams = count, lanes = n, strips = of_image;
      }
    }
    const int64_t resident = net.resident_rows ? parts(height, teams * net.resident_rows) : 1;
    bands = teams * larger(1, smaller(resident, height / 4 / teams));
  }

  // Columns [begin(strip), begin(strip + 1)) are a strip.
  int64_t begin(int64_t strip) const { return strip * (columns / kStripTile) / strips * kStripTile; }
  int64_t widest() const { return parts(columns / kStripTile, strips) * kStripTile; }

  int64_t half;
  int64_t
      start;  // lag, in columns, of a group's first stage: such that k's, where it is aggregated, is a multiple of four
  int64_t halo;  // of a group and the stages after it, in rows and columns
  int64_t columns, row_stride, summed_parts;
  int64_t images = 0;                       // at a time
  int64_t teams = 1, lanes = 1, bands = 1;  // of an image: teams of threads, threads of a team, bands of all teams
  int64_t strips = 1;

 private:
  int64_t strips_of(int64_t threads) const {
    return threads > 1 ? threads * parts(columns, threads * kStripWidth) : larger(1, columns / kStripWidth);
  }

  // The time until the slowest thread is done with an image, in pixels of a whole chain. Work of all threads that is
  // more than an eighth above that of one weighs heavily: it would be missing elsewhere, and heat.
  double cost_of(int64_t height, int64_t teams, int64_t lanes, int64_t strips) const {
    constexpr int64_t kStripCost = 5;               // columns: the halo that a strip takes over from the one before
    constexpr int64_t kFollows = 4;                 // rows that a thread is behind the one on its left
    const int64_t borders = smaller(teams - 1, 2);  // of a band with others
    const int64_t width = strips / lanes * (parts(columns / kStripTile, strips) * kStripTile + kStripCost);
    const double time =
        static_cast<double>(width) * (parts(height, teams) + borders * halo / 2 + (lanes - 1) * kFollows);
    const double rows = static_cast<double>(height + (teams - 1) * halo) / height;
    const double work = rows * (columns + strips * kStripCost) / (columns + strips_of(1) * kStripCost);
    const double excess = work > 1.125 ? work / 1.125 : 1;
    return time * excess * excess * excess * excess * excess;
  }
};

template <class Cell>
class Engine {
 public:
  Engine(const Network& net, void* state, void* workspace)
      : net_(net),
        config_(net.config),
        plan_(net, net.size.batch),
        weights_(outer_weights(net)),
        wavefront_(plan_.images * plan_.teams, plan_.strips) {
    Arena states(state);
    filed_ = static_cast<const char*>(state) + net.resident_bytes;
    state_ = allocate_state(states, plan_.images * net.size.height);
    halo_rows_ = allocate_state(states, plan_.bands > 1 ? plan_.images * plan_.bands * 2 * plan_.halo : 0);
    Arena arena(workspace);
    sums_ = arena.allocate<float>(plan_.images * sums_size());
    finite_ = arena.allocate<int64_t>(plan_.images * plan_.bands * plan_.lanes);
    table_ = arena.allocate<char>(table_bytes());
    routings_ = arena.allocate<char>(plan_.images * routing_bytes());
    count_scratch();
    edges_ = arena.allocate<char>(plan_.images * plan_.teams * edges_bytes_);
    scratch_ = arena.allocate<char>(plan_.images * plan_.teams * plan_.lanes * scratch_bytes_);
    memory_ = {states.bytes(), arena.bytes()};
  }

  NetworkMemory memory() const { return memory_; }

  // Return whether all pixels were finite before they were converted to integers.
  bool operator()() {
    bool is_finite = true;
    Arena table(table_);
    const ColumnTable up(table, plan_.columns, net_.size.width, map_columns());
    if (net_.progress) {
      net_.progress[0] = 0;
      net_.progress[1] = net_.size.batch * (config_.groups + 1) * net_.size.height * plan_.strips;
    }
    if (!net_.resident_rows) clear_margins();  // a new file has zeros
    for (int64_t first = 0; first < net_.size.batch; first += plan_.images) {
      const int64_t images = smaller(plan_.images, net_.size.batch - first);
      for (int64_t group = 0; group <= config_.groups; ++group) {
        if (group > 0) {
          choose_experts(images, group - 1);
          if (plan_.bands > 1) copy_halo_rows(images);
        }
        for (int64_t team = 0; team < images * plan_.teams; ++team) wavefront_.restart(team);
        for_each(images * plan_.teams * plan_.lanes, [&](int64_t i) { sweep_bands(i, first, group, up); });
      }
      for (int64_t i = 0; i < images * plan_.bands * plan_.lanes; ++i) is_finite &= finite_[i];
    }
    return is_finite;
  }

 private:
  static NetworkWeights<Cell> outer_weights(const Network& net) {
    Arena arena(const_cast<void*>(net.weights));
    return NetworkWeights<Cell>(arena, net.config);
  }

  State<Cell> allocate_state(Arena& arena, int64_t rows) const {
    const int64_t lag = plan_.start + plan_.halo - 2;
    State<Cell> state{config_.channels, all_ranks(config_), plan_.row_stride, lag, nullptr, nullptr, nullptr};
    state.x = arena.allocate<float>(rows * state.channels * state.row_stride);
    state.a = arena.allocate<Cell>(rows * cells_of<Cell>(state.channels) * state.row_stride);
    state.k = arena.allocate<float>(rows * state.ranks * state.row_stride);
    return state;
  }

  int64_t sums_size() const { return net_.size.height * plan_.summed_parts * config_.channels; }
  int64_t map_columns() const {
    int64_t columns = net_.size.width;
    for (int64_t i = 0; i < config_.recursive; ++i) columns /= 4;
    return columns;
  }
  int64_t table_bytes() const {
    Arena arena(nullptr);
    ColumnTable(arena, plan_.columns, 1, 1);
    return arena.bytes();
  }
  int64_t routing_bytes() const {
    Arena arena(nullptr);
    RoutingState<Cell>(arena, config_, net_.size);
    return arena.bytes();
  }
  RoutingState<Cell> routing_of(int64_t image) const {
    Arena arena(routings_ + image * routing_bytes());
    return RoutingState<Cell>(arena, config_, net_.size);
  }

  Band<Cell> band_of(int64_t task, int64_t first_image = 0) const {
    const int64_t image = task / plan_.bands, band = task % plan_.bands, height = net_.size.height;
    const auto edge = [&](int64_t i) { return i == plan_.bands ? height : i * (height / 4) / plan_.bands * 4; };
    return {image,
            first_image + image,
            edge(band),
            edge(band + 1),
            state_.from_row(image * height),
            halo_rows_.from_row(task * 2 * plan_.halo),
            plan_.halo};
  }

  // Clear the columns that are read, though no result depends on them, and never written: they must be finite.
  void clear_margins() {
    for_each(plan_.images * net_.size.height, [&](int64_t row) {
      const State<Cell> state = state_.from_row(row);
      clear_margin(state.x, state.channels);
      clear_margin(state.a, cells_of<Cell>(state.channels));
      clear_margin(state.k, state.ranks);
    });
  }

  template <class T>
  void clear_margin(T* rows, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      std::memset(rows + i * plan_.row_stride + plan_.columns, 0, (plan_.row_stride - plan_.columns) * sizeof(T));
    }
  }

  void copy_halo_rows(int64_t images) {
    for_each(images * plan_.bands, [&](int64_t task) {
      const Band<Cell> band = band_of(task);
      for (int64_t i = 0; i < 2 * plan_.halo; ++i) {
        const int64_t row = i < plan_.halo ? band.top - plan_.halo + i : band.bottom + i - plan_.halo;
        if (row < 0 || row >= net_.size.height) continue;
        const State<Cell> from = band.state.from_row(row), next = band.state.from_row(row + 1),
                          to = band.halo_rows.from_row(i);
        std::memcpy(to.x, from.x, (next.x - from.x) * sizeof(float));
        std::memcpy(to.a, from.a, (next.a - from.a) * sizeof(Cell));
        std::memcpy(to.k, from.k, (next.k - from.k) * sizeof(float));
        if (net_.resident_rows) release(state_, band.image * net_.size.height + row, 1);
      }
      if (net_.resident_rows) release(halo_rows_, task * 2 * plan_.halo, 2 * plan_.halo);
    });
  }

  void choose_experts(int64_t images, int64_t group) {
    const GroupWeights<Cell> weights = group_weights<Cell>(config_, net_.weights, group);
    for_each(images * config_.channels,
             [&](int64_t i) { routing_of(i / config_.channels).calibrate(weights, i % config_.channels); });
    for_each(images, [&](int64_t image) {
      routing_of(image).choose(weights.experts, sums_ + image * sums_size(), plan_.summed_parts);
    });
  }

  // Call body(source, sink) with the chain of a band's sweep, which begins after group - 1, or with the image, and ends
  // at the pool of group `group`, or with the pixels.
  template <class Body>
  void with_chain(const Band<Cell>& band, Strip& strip, int64_t group, const ColumnTable& up, const Body& body) const {
    const int64_t channels = config_.channels, lag = state_.lag;
    const GroupWeights<Cell> before = group_weights<Cell>(config_, net_.weights, larger(0, group - 1));
    const GroupWeights<Cell> next =
        group_weights<Cell>(config_, net_.weights, group);  // of the last group, only counted
    const RoutingState<Cell> routing = routing_of(band.image);
    const auto with_source = [&](auto& source) {
      if (group == config_.groups) {
        OutputSink<Cell> tail(strip, band, net_, weights_, lag);
        body(source, tail);
      } else {
        const GroupSums sums = routing.group_sums(sums_ + band.image * sums_size(), plan_.summed_parts);
        PoolSink<Cell> pool(strip, band, next, sums, channels, lag);
        body(source, pool);
      }
    };
    if (group == 0) {
      HeadSource<Cell> head(strip, band, net_, weights_.conv_1, lag);
      with_source(head);
    } else {
      GroupSource<Cell> source(strip, band, before, routing, up, channels, plan_.start);
      with_source(source);
    }
  }

  Strip strip_of(const Band<Cell>& band, Arena& scratch, Arena& edges) const {
    const int64_t first_row = larger(0, band.top - plan_.halo);
    const int64_t last_row = smaller(net_.size.height, band.bottom + plan_.halo);
    return {net_.size.height, net_.size.width, first_row, last_row, plan_.widest(), &scratch, &edges, false, 0, 0};
  }

  // Count the bytes of the largest chain of any band.
  void count_scratch() {
    Arena nothing(nullptr);
    const ColumnTable up(nothing, 0, 1, 1);
    for (int64_t task = 0; task < plan_.bands; ++task) {
      for (int64_t group = 0; group <= config_.groups; ++group) {
        Arena scratch(nullptr), edges(nullptr);
        const Band<Cell> band = band_of(task);
        Strip strip = strip_of(band, scratch, edges);
        with_chain(band, strip, group, up, [](auto&, auto&) {});
        scratch_bytes_ = larger(scratch_bytes_, scratch.bytes()), edges_bytes_ = larger(edges_bytes_, edges.bytes());
      }
    }
  }

  // All bands of one thread's team, alternately forth and back: the last ones are likely to be in memory still.
  void sweep_bands(int64_t thread, int64_t first_image, int64_t group, const ColumnTable& up) {
    const int64_t team = thread / plan_.lanes, count = plan_.bands / plan_.teams;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t task = team * count + (group % 2 == 0 ? i : count - 1 - i);
      if (i > 0) wavefront_.restart(team);  // there are several bands only where a team is one thread
      sweep(task, thread, first_image, group, up);
      if (net_.resident_rows) {
        const Band<Cell> band = band_of(task);
        release(state_, band.image * net_.size.height + band.top, band.bottom - band.top);
        if (plan_.bands > 1) release(halo_rows_, task * 2 * plan_.halo, 2 * plan_.halo);
      }
    }
  }

  void release(const State<Cell>& state, int64_t row, int64_t count) const {
    const State<Cell> begin = state.from_row(row), end = state.from_row(row + count);
    release(begin.x, end.x);
    release(begin.a, end.a);
    release(begin.k, end.k);
  }

  void release(const void* begin, const void* end) const { release_pages(begin < filed_ ? filed_ : begin, end); }

  // The thread's share of the strips of a band.
  void sweep(int64_t task, int64_t thread, int64_t first_image, int64_t group, const ColumnTable& up) {
    const int64_t team = thread / plan_.lanes;
    const Band<Cell> band = band_of(task, first_image);
    Arena scratch(scratch_ + thread * scratch_bytes_), edges(edges_ + team * edges_bytes_);
    Strip strip = strip_of(band, scratch, edges);
    with_chain(band, strip, group, up, [&](auto& source, auto& sink) {
      for (int64_t s = wavefront_.take(team); s < plan_.strips; s = wavefront_.take(team)) {
        strip.is_last = s + 1 == plan_.strips;
        strip.begin = plan_.begin(s);
        strip.width = plan_.begin(s + 1) - strip.begin;
        stream(band, strip, source, sink, team, s);
      }
      finite_[task * plan_.lanes + thread % plan_.lanes] = sink.is_finite();
    });
  }

  template <class From, class To>
  void stream(const Band<Cell>& band, const Strip& strip, From& source, To& sink, int64_t team, int64_t number) {
    // Convolutions compute two rows at once, and bands begin at even ones: after row 2n + 1 they compute 2n - 1 and
    // 2n, and the stages after them, with a halo of one row, 2n - 2 and 2n - 1.
    const int64_t begin = band.top - 2 - 2 * source.delay, end = band.bottom + 3;
    for (int64_t row = begin; row < end; ++row) {
      if (row % 2 == 0) wavefront_.wait(team, number, smaller(row + 2, end) - begin, end - begin);
      source.step(row + source.delay);
      if (band.takes_part(row, 2, strip)) sink.push(row, source);
      if (row % 2 == 0) continue;
      if (row >= band.top) {
        if (row - 2 <= band.bottom) sink.pull(row - 2);
        if (row - 3 >= band.top) sink.finish(row - 3);
      }
      wavefront_.done(team, number, row + 1 - begin);
    }
    wavefront_.done(team, number, end - begin);
    if (net_.progress) __atomic_fetch_add(net_.progress, band.bottom - band.top, __ATOMIC_RELAXED);
  }

  const Network& net_;
  const NetworkConfig& config_;
  const Plan plan_;
  const NetworkWeights<Cell> weights_;
  State<Cell> state_, halo_rows_;
  const void* filed_;  // from here on to the end of the state, memory is mapped from a file
  float* sums_;
  int64_t* finite_;
  char *table_, *routings_, *edges_, *scratch_;
  int64_t edges_bytes_ = 0, scratch_bytes_ = 0;
  NetworkMemory memory_;
  Wavefront wavefront_;
};

}  // namespace

NetworkMemory network_memory(const Network& net) {
  return is_bfloat16(net.config) ? Engine<Pair>(net, nullptr, nullptr).memory()
                                 : Engine<float>(net, nullptr, nullptr).memory();
}

bool network(const Network& net, void* state, void* workspace) {
  return is_bfloat16(net.config) ? Engine<Pair>(net, state, workspace)() : Engine<float>(net, state, workspace)();
}

}  // namespace seemore::SEEMORE_ISA
