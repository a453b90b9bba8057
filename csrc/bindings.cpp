// The operators of a library, on torch's stable ABI. Compiled once for each library, whose device.h says what differs:
// SEEMORE_NAMESPACE (of the operators in torch.ops), SEEMORE_KEY (their dispatch key) and OnDevice, which makes a
// device the current one and knows its stream. Arguments were checked in Python (seemore_fast/ops); results are
// written to tensors that the caller allocated.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "device.h"
#include "striped_conv.h"

namespace {

using seemore::Image;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

seemore::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return seemore::DType::float32;
    case ScalarType::Double:
      return seemore::DType::float64;
    case ScalarType::Half:
      return seemore::DType::float16;
    case ScalarType::BFloat16:
      return seemore::DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

seemore::Activation activation_of(const std::optional<std::string>& name) {
  return name == "gelu" ? seemore::Activation::gelu : seemore::Activation::none;
}

Image image(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

Image image(const std::optional<Tensor>& x) { return x ? image(*x) : Image{}; }

seemore::StripedConv striped_conv_inputs(const Tensor& x, const Tensor& weight_row, const Tensor& bias_row,
                                         const Tensor& weight_col, const Tensor& bias_col,
                                         const std::optional<std::string>& activation,
                                         const std::optional<Tensor>& gate) {
  return {dtype_of(x),
          {x.size(0), x.size(1), x.size(2), x.size(3)},
          weight_row.size(3),
          activation_of(activation),
          image(x),
          image(gate),
          weight_row.data_ptr(),
          bias_row.data_ptr(),
          weight_col.data_ptr(),
          bias_col.data_ptr()};
}

void striped_conv(Tensor y, Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, Tensor bias_col,
                  std::optional<std::string> activation, std::optional<Tensor> gate) {
  const OnDevice device(x);
  const auto inputs = striped_conv_inputs(x, weight_row, bias_row, weight_col, bias_col, activation, gate);
  seemore::striped_conv(inputs, image(y), device.stream);
}

Tensor striped_conv_backward(Tensor dx, std::optional<Tensor> dgate, Tensor dy, Tensor x, Tensor weight_row,
                             Tensor bias_row, Tensor weight_col, Tensor bias_col, std::optional<std::string> activation,
                             std::optional<Tensor> gate) {
  const OnDevice device(x);
  const auto inputs = striped_conv_inputs(x, weight_row, bias_row, weight_col, bias_col, activation, gate);
  const auto workspace = seemore::striped_conv_workspace(inputs);
  const auto partial =
      torch::stable::new_empty(x, {workspace.parts, x.size(1), 2 * inputs.taps + 2}, accumulation_type(x));
  const auto scratch = torch::stable::new_empty(x, {workspace.scratch}, accumulation_type(x));
  const seemore::StripedConvGradients gradients{image(dy), image(dx), image(dgate), partial.data_ptr(),
                                                scratch.data_ptr()};
  seemore::striped_conv_backward(inputs, gradients, device.stream);
  return partial;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SEEMORE_NAMESPACE, m) {
  m.def(
      "striped_conv(Tensor(a!) y, Tensor x, Tensor weight_row, Tensor bias_row, Tensor weight_col, Tensor bias_col, "
      "str? activation, Tensor? gate) -> ()");
  m.def(
      "striped_conv_backward(Tensor(a!) dx, Tensor(b!)? dgate, Tensor dy, Tensor x, Tensor weight_row, "
      "Tensor bias_row, Tensor weight_col, Tensor bias_col, str? activation, Tensor? gate) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(SEEMORE_NAMESPACE, SEEMORE_KEY, m) {
  m.impl("striped_conv", TORCH_BOX(&striped_conv));
  m.impl("striped_conv_backward", TORCH_BOX(&striped_conv_backward));
}
