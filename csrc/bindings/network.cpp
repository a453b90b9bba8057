// The network's operators. SeemoRe.forward and engine.py in seemore_fast/network check images and model.

#include "params/network.h"

#include <optional>
#include <vector>

#include "bindings/tensors.h"

namespace {

using namespace seemore::bindings;

// The fields of the configuration, then the experts' ranks.
seemore::NetworkConfig config_of(const std::vector<int64_t>& numbers) {
  seemore::NetworkConfig config;
  int64_t next = 0, fields = 0;
#define FIELD(name) ++fields;
  SEEMORE_NETWORK_FIELDS(FIELD)
#undef FIELD
  const int64_t count = numbers.size();
  STD_TORCH_CHECK(count > fields, "expected ", fields, " numbers and the experts' ranks, got ", count, " numbers");
#define FIELD(name) config.name = numbers[next++];
  SEEMORE_NETWORK_FIELDS(FIELD)
#undef FIELD
  config.experts = count - fields;
  config.ranks = numbers.data() + fields;
  return config;
}

Tensor pack(const Tensor& parameters, const std::vector<int64_t>& config) {
  const auto network = config_of(config);
  const auto sizes = seemore::network_sizes(network);
  STD_TORCH_CHECK(parameters.numel() == sizes.parameters && parameters.scalar_type() == ScalarType::Float, "expected ",
                  sizes.parameters, " float32 parameters, got ", parameters.numel());
  const auto weights = torch::stable::new_empty(parameters, {sizes.weights / 4});
  const OnDevice device(parameters);
  seemore::network_pack(network, static_cast<const float*>(parameters.data_ptr()), weights.data_ptr(), device.stream);
  return weights;
}

std::vector<int64_t> memory(const std::vector<int64_t>& config, int64_t batch, int64_t height, int64_t width,
                            int64_t threads, int64_t resident_rows) {
  seemore::Network network{};
  network.config = config_of(config);
  network.size = {batch, network.config.in_channels, height, width};
  network.threads = threads;
  network.resident_rows = resident_rows;
  const auto needed = seemore::network_memory(network);
  return {needed.state, needed.workspace};
}

bool run(const Tensor& y, const Tensor& x, const Tensor& weights, const Tensor& mean, double img_range,
         const std::vector<int64_t>& config, const std::optional<Tensor>& mapped, int64_t resident_rows,
         int64_t resident_bytes, const std::optional<Tensor>& progress, const std::optional<Tensor>& is_finite) {
  const auto type = x.scalar_type();
  const OnDevice device(x);
  const auto network = seemore::Network{config_of(config),
                                        size(x),
                                        type == ScalarType::Byte     ? 255
                                        : type == ScalarType::UInt16 ? 65535
                                                                     : 0,
                                        image(x),
                                        image(y),
                                        static_cast<const float*>(mean.data_ptr()),
                                        static_cast<float>(img_range),
                                        weights.data_ptr(),
                                        device.stream,
                                        is_finite ? static_cast<int*>(is_finite->data_ptr()) : nullptr,
                                        static_cast<int64_t>(torch::stable::get_num_threads()),
                                        resident_rows,
                                        resident_bytes,
                                        progress ? static_cast<int64_t*>(progress->data_ptr()) : nullptr};
  const auto needed = seemore::network_memory(network);
  const auto state = mapped ? *mapped : torch::stable::new_empty(weights, {(needed.state + 3) / 4});
  const int64_t bytes = mapped ? state.numel() : needed.state;
  STD_TORCH_CHECK(bytes >= needed.state, "expected ", needed.state, " bytes of state, got ", bytes);
  const auto workspace = torch::stable::new_empty(weights, {(needed.workspace + 3) / 4});
  return seemore::network(network, state.data_ptr(), workspace.data_ptr());
}

// The image, of which the tensor has the rows from `first` on.
seemore::Image rows_of(const OptionalTensor& x, int64_t first) {
  auto view = image(x);
  if (x) {
    const int64_t bytes = x->scalar_type() == ScalarType::Byte ? 1 : x->scalar_type() == ScalarType::UInt16 ? 2 : 4;
    view.data = static_cast<char*>(view.data) - first * view.row * bytes;
  }
  return view;
}

seemore::Network one_image(const std::vector<int64_t>& config, int64_t height, int64_t width) {
  seemore::Network network{};
  network.config = config_of(config);
  network.size = {1, network.config.in_channels, height, width};
  return network;
}

std::vector<int64_t> part_memory(const std::vector<int64_t>& config, int64_t height, int64_t width, int64_t rows) {
  if constexpr (kIsCuda) {
    const auto needed = seemore::network_part_memory(one_image(config, height, width), rows);
    return {needed.band, needed.rest, needed.features, needed.unit};
  }
  return {};
}

// place: height, width, pass, first and last row, those of the part before, the first row of x, rows of a band.
void run_part(const OptionalTensor& y, const OptionalTensor& x, const Tensor& features, const Tensor& band,
              const Tensor& rest, const Tensor& weights, const Tensor& mean, double img_range,
              const std::vector<int64_t>& config, const std::vector<int64_t>& place, const OptionalTensor& is_finite) {
  if constexpr (kIsCuda) {
    STD_TORCH_CHECK(place.size() == 9, "expected 9 numbers of a place, got ", place.size());
    auto network = one_image(config, place[0], place[1]);
    const seemore::NetworkPart part{place[2], {place[3], place[4]}, {place[5], place[6]}, features.data_ptr()};
    const auto needed = seemore::network_part_memory(network, place[8]);
    STD_TORCH_CHECK(band.numel() >= needed.band && rest.numel() >= needed.rest && features.numel() >= needed.features,
                    "expected ", needed.band, ", ", needed.rest, " and ", needed.features, " bytes, got ", band.numel(),
                    ", ", rest.numel(), " and ", features.numel());
    const OnDevice device(weights);
    const auto type = x ? x->scalar_type() : ScalarType::Float;
    network.max_value = type == ScalarType::Byte ? 255 : type == ScalarType::UInt16 ? 65535 : 0;
    network.x = rows_of(x, place[7]), network.y = rows_of(y, place[3] * network.config.scale);
    network.mean = static_cast<const float*>(mean.data_ptr());
    network.img_range = static_cast<float>(img_range);
    network.weights = weights.data_ptr();
    network.stream = device.stream;
    network.is_finite = is_finite ? static_cast<int*>(is_finite->data_ptr()) : nullptr;
    seemore::network_part(network, part, place[8], band.data_ptr(), rest.data_ptr());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def("network_pack(Tensor parameters, int[] config) -> Tensor");
  m.def("network_memory(int[] config, int batch, int height, int width, int threads, int resident_rows) -> int[]");
  m.def(
      "network(Tensor(a!) y, Tensor x, Tensor weights, Tensor mean, float img_range, int[] config, Tensor? mapped, "
      "int resident_rows, int resident_bytes, Tensor(b!)? progress, Tensor(c!)? is_finite) -> bool");
  if constexpr (kIsCuda) {
    m.def("network_part_memory(int[] config, int height, int width, int rows) -> int[]");
    m.def(
        "network_part(Tensor(a!)? y, Tensor? x, Tensor(b!) features, Tensor(c!) band, Tensor(d!) rest, Tensor weights, "
        "Tensor mean, float img_range, int[] config, int[] place, Tensor(e!)? is_finite) -> ()");
  }
}

STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("network_pack", TORCH_BOX(&pack));
  m.impl("network", TORCH_BOX(&run));
  m.impl("network_memory", TORCH_BOX(&memory));
  if constexpr (kIsCuda) {
    m.impl("network_part_memory", TORCH_BOX(&part_memory));
    m.impl("network_part", TORCH_BOX(&run_part));
  }
}
