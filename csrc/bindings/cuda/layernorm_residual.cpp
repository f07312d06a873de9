// layernorm_residual_forward and layernorm_residual_backward: the arguments of csrc/cuda/layernorm_residual.h.
#include "operands.h"
#include "cuda/layernorm_residual.h"

namespace fastlm::bindings {

struct layernorm_residual_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), residual = keyword_or_none("residual"), weight = keyword("weight"),
         bias = keyword_or_none("bias"), y = keyword("y"), summed = keyword_or_none("summed"), mean = keyword("mean"),
         rstd = keyword("rstd"), seed = keyword_or_none("seed");
  float eps = keyword("eps");
  double dropout_p = keyword("dropout_p");
  launch_target target{keyword("device"), keyword("stream")};
};

static void layernorm_residual_forward(const layernorm_residual_forward_arguments& a) {
  const dtype residual_dtype = a.residual.given() ? a.residual.type : a.x.type;
  const row_view<void> x = rows_of(a.x, a.x.type), residual = rows_of(a.residual, residual_dtype, x.count, x.width);
  const int64_t rows = x.count, width = x.width;
  a.target.launch(cuda::layernorm_residual_forward, cuda::layernorm_residual_forward_args{
                                                        .x_dtype = launch_dtype(a.x),
                                                        .residual_dtype = launch_dtype(residual_dtype, a.residual.name),
                                                        .weight_dtype = launch_dtype(a.weight),
                                                        .x = x.data,
                                                        .x_stride = x.stride,
                                                        .residual = residual.data,
                                                        .residual_stride = residual.stride,
                                                        .weight = contiguous_of(a.weight, a.weight.type, width),
                                                        .bias = contiguous_of(a.bias, a.weight.type, width),
                                                        .y = contiguous_of(a.y, a.x.type, rows * width),
                                                        .summed = contiguous_of(a.summed, residual_dtype, rows * width),
                                                        .mean = a.mean.contiguous_as<float>(rows),
                                                        .rstd = a.rstd.contiguous_as<float>(rows),
                                                        .seed = a.seed.contiguous_as<const int64_t>(1),
                                                        .rows = rows,
                                                        .width = width,
                                                        .eps = a.eps,
                                                        .dropout_p = a.dropout_p,
                                                    });
}
FASTLM_BINDING(layernorm_residual_forward)

struct layernorm_residual_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword_or_none("dy"), dsummed = keyword_or_none("dsummed"), summed = keyword("summed"),
         weight = keyword("weight"), mean = keyword("mean"), rstd = keyword("rstd"), dx = keyword_or_none("dx"),
         dresidual = keyword_or_none("dresidual"), dweight = keyword_or_none("dweight"),
         dbias = keyword_or_none("dbias"), partials = keyword_or_none("partials"), seed = keyword_or_none("seed");
  dtype x_dtype = keyword("x_dtype");
  double dropout_p = keyword("dropout_p");
  launch_target target{keyword("device"), keyword("stream")};
};

static void layernorm_residual_backward(const layernorm_residual_backward_arguments& a) {
  const dtype residual_dtype = a.summed.type;
  const row_view<void> summed = rows_of(a.summed, residual_dtype);
  const int64_t rows = summed.count, width = summed.width;
  const row_view<void> dy = rows_of(a.dy, a.x_dtype, rows, width),
                       dsummed = rows_of(a.dsummed, residual_dtype, rows, width);
  const int64_t gradients = a.dweight.given() + a.dbias.given(), padded_width = (width + 7) / 8 * 8;
  a.target.launch(cuda::layernorm_residual_backward,
                  cuda::layernorm_residual_backward_args{
                      .x_dtype = launch_dtype(a.x_dtype, "x_dtype"),
                      .residual_dtype = launch_dtype(a.summed),
                      .weight_dtype = launch_dtype(a.weight),
                      .dy = dy.data,
                      .dy_stride = dy.stride,
                      .dsummed = dsummed.data,
                      .dsummed_stride = dsummed.stride,
                      .summed = summed.data,
                      .summed_stride = summed.stride,
                      .weight = contiguous_of(a.weight, a.weight.type, width),
                      .mean = a.mean.contiguous_as<const float>(rows),
                      .rstd = a.rstd.contiguous_as<const float>(rows),
                      .dx = contiguous_of(a.dx, a.x_dtype, rows * width),
                      .dresidual = contiguous_of(a.dresidual, residual_dtype, rows * width),
                      .dweight = contiguous_of(a.dweight, a.weight.type, width),
                      .dbias = contiguous_of(a.dbias, a.weight.type, width),
                      .partials = a.partials.contiguous_as<float>(gradients * cuda::layernorm_residual_max_partials() *
                                                                  padded_width),
                      .seed = a.seed.contiguous_as<const int64_t>(1),
                      .rows = rows,
                      .width = width,
                      .dropout_p = a.dropout_p,
                  });
}
FASTLM_BINDING(layernorm_residual_backward)

struct layernorm_residual_max_partials_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
};

static int64_t layernorm_residual_max_partials(const layernorm_residual_max_partials_arguments&) {
  return cuda::layernorm_residual_max_partials();
}
FASTLM_BINDING(layernorm_residual_max_partials)

}  // namespace fastlm::bindings
