// gelu_mlp_forward and gelu_mlp_backward: the arguments of csrc/cuda/gelu_mlp.h.
#include "operands.h"
#include "cuda/gelu_mlp.h"

namespace fastlm::bindings {

struct gelu_mlp_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), w1 = keyword("w1"), b1 = keyword_or_none("b1"), hidden = keyword_or_none("hidden"),
         activated = keyword_or_none("activated");
  bool conv1d = keyword("conv1d"), tanh = keyword("tanh"), tf32 = keyword("tf32");
  launch_target target{keyword("device"), keyword("stream")};
};

static void gelu_mlp_forward(const gelu_mlp_forward_arguments& a) {
  const row_view<void> x = rows_of(a.x, a.x.type);
  const weight_view w1(a.w1, a.x.type, a.conv1d);
  check_size(a.w1, "an input size of", x.width, w1.inputs);
  const int64_t elements = x.count * w1.outputs;
  a.target.launch(cuda::gelu_mlp_forward, cuda::gelu_mlp_forward_args{
                                              .dtype = launch_dtype(a.x),
                                              .x = x.data,
                                              .x_stride = x.stride,
                                              .w1 = w1.data,
                                              .w1_k_stride = w1.input_stride,
                                              .w1_n_stride = w1.output_stride,
                                              .b1 = contiguous_of(a.b1, a.x.type, w1.outputs),
                                              .hidden = contiguous_of(a.hidden, a.x.type, elements),
                                              .activated = contiguous_of(a.activated, a.x.type, elements),
                                              .rows = x.count,
                                              .width = x.width,
                                              .hidden_width = w1.outputs,
                                              .tanh = a.tanh,
                                              .tf32 = a.tf32,
                                          });
}
FASTLM_BINDING(gelu_mlp_forward)

struct gelu_mlp_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword("dy"), w2 = keyword("w2"), hidden = keyword("hidden"), dhidden = keyword("dhidden"),
         activated = keyword_or_none("activated");
  bool conv1d = keyword("conv1d"), tanh = keyword("tanh"), tf32 = keyword("tf32");
  launch_target target{keyword("device"), keyword("stream")};
};

static void gelu_mlp_backward(const gelu_mlp_backward_arguments& a) {
  const row_view<void> dy = rows_of(a.dy, a.dy.type);
  const weight_view w2(a.w2, a.dy.type, a.conv1d);
  check_size(a.w2, "an output size of", dy.width, w2.outputs);
  const int64_t elements = dy.count * w2.inputs;
  a.target.launch(cuda::gelu_mlp_backward, cuda::gelu_mlp_backward_args{
                                               .dtype = launch_dtype(a.dy),
                                               .dy = dy.data,
                                               .dy_stride = dy.stride,
                                               .w2 = w2.data,
                                               .w2_k_stride = w2.output_stride,
                                               .w2_n_stride = w2.input_stride,
                                               .hidden = contiguous_of(a.hidden, a.dy.type, elements),
                                               .dhidden = contiguous_of(a.dhidden, a.dy.type, elements),
                                               .activated = contiguous_of(a.activated, a.dy.type, elements),
                                               .rows = dy.count,
                                               .out_width = dy.width,
                                               .hidden_width = w2.inputs,
                                               .tanh = a.tanh,
                                               .tf32 = a.tf32,
                                           });
}
FASTLM_BINDING(gelu_mlp_backward)

}  // namespace fastlm::bindings
