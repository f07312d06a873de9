// glu_mlp_forward and glu_mlp_backward: the arguments of csrc/cuda/glu_mlp.h.
#include "operands.h"
#include "cuda/glu_mlp.h"

namespace fastlm::bindings {

struct glu_mlp_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), w_up = keyword("w_up"), b_up = keyword_or_none("b_up"), gate = keyword("gate"),
         up = keyword_or_none("up"), activated = keyword("activated");
  activation_kind activation = keyword("activation");
  bool tf32 = keyword("tf32");
  launch_target target{keyword("device"), keyword("stream")};
};

static void glu_mlp_forward(const glu_mlp_forward_arguments& a) {
  const row_view<void> x = rows_of(a.x, a.x.type);
  const weight_view w_up(a.w_up, a.x.type, false);
  check_size(a.w_up, "an input size of", x.width, w_up.inputs);
  const int64_t elements = x.count * w_up.outputs;
  a.target.launch(cuda::glu_mlp_forward, cuda::glu_mlp_forward_args{
                                             .dtype = launch_dtype(a.x),
                                             .x = x.data,
                                             .x_stride = x.stride,
                                             .w_up = w_up.data,
                                             .w_up_k_stride = w_up.input_stride,
                                             .w_up_n_stride = w_up.output_stride,
                                             .b_up = contiguous_of(a.b_up, a.x.type, w_up.outputs),
                                             .gate = contiguous_of(a.gate, a.x.type, elements),
                                             .up = contiguous_of(a.up, a.x.type, elements),
                                             .activated = contiguous_of(a.activated, a.x.type, elements),
                                             .rows = x.count,
                                             .width = x.width,
                                             .hidden_width = w_up.outputs,
                                             .activation = a.activation,
                                             .tf32 = a.tf32,
                                         });
}
FASTLM_BINDING(glu_mlp_forward)

struct glu_mlp_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword("dy"), w_down = keyword("w_down"), gate = keyword("gate"), up = keyword("up"),
         dgate = keyword("dgate"), dup = keyword("dup"), activated = keyword_or_none("activated");
  activation_kind activation = keyword("activation");
  bool tf32 = keyword("tf32");
  launch_target target{keyword("device"), keyword("stream")};
};

static void glu_mlp_backward(const glu_mlp_backward_arguments& a) {
  const row_view<void> dy = rows_of(a.dy, a.dy.type);
  const weight_view w_down(a.w_down, a.dy.type, false);
  check_size(a.w_down, "an output size of", dy.width, w_down.outputs);
  const int64_t elements = dy.count * w_down.inputs;
  a.target.launch(cuda::glu_mlp_backward, cuda::glu_mlp_backward_args{
                                              .dtype = launch_dtype(a.dy),
                                              .dy = dy.data,
                                              .dy_stride = dy.stride,
                                              .w_down = w_down.data,
                                              .w_down_k_stride = w_down.output_stride,
                                              .w_down_n_stride = w_down.input_stride,
                                              .gate = contiguous_of(a.gate, a.dy.type, elements),
                                              .up = contiguous_of(a.up, a.dy.type, elements),
                                              .dgate = contiguous_of(a.dgate, a.dy.type, elements),
                                              .dup = contiguous_of(a.dup, a.dy.type, elements),
                                              .activated = contiguous_of(a.activated, a.dy.type, elements),
                                              .rows = dy.count,
                                              .out_width = dy.width,
                                              .hidden_width = w_down.inputs,
                                              .activation = a.activation,
                                              .tf32 = a.tf32,
                                          });
}
FASTLM_BINDING(glu_mlp_backward)

}  // namespace fastlm::bindings
