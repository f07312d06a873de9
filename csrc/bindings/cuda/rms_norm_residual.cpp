// rms_norm_residual_forward and rms_norm_residual_backward: the arguments of csrc/cuda/rms_norm_residual.h.
#include "operands.h"
#include "../strided_rows.h"
#include "cuda/rms_norm_residual.h"

namespace fastlm::bindings {

static strided_rows<void> strided_rows_of(const tensor& x, dtype type, int64_t count, int64_t width) {
  return of_type(x, type, [&]<class T>() -> strided_rows<void> {
    const auto rows = fastlm::strided_rows_of<T>(x, count, width);
    return {rows.data, rows.layout};
  });
}

struct rms_norm_residual_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), residual = keyword_or_none("residual"), weight = keyword("weight"), y = keyword("y"),
         summed = keyword_or_none("summed"), rstd = keyword("rstd"), seed = keyword_or_none("seed");
  float eps = keyword("eps");
  bool unit_offset = keyword("unit_offset");
  double dropout_p = keyword("dropout_p");
  launch_target target{keyword("device"), keyword("stream")};
};

static void rms_norm_residual_forward(const rms_norm_residual_forward_arguments& a) {
  const dtype residual_dtype = a.residual.given() ? a.residual.type : a.x.type;
  const int64_t width = a.x.width, rows = width ? a.x.count / width : 0;
  const strided_rows<void> x = strided_rows_of(a.x, a.x.type, rows, width),
                           residual = strided_rows_of(a.residual, residual_dtype, rows, width);
  a.target.launch(cuda::rms_norm_residual_forward, cuda::rms_norm_residual_forward_args{
                                                       .x_dtype = launch_dtype(a.x),
                                                       .residual_dtype = launch_dtype(residual_dtype, a.residual.name),
                                                       .weight_dtype = launch_dtype(a.weight),
                                                       .x = x.data,
                                                       .x_layout = x.layout,
                                                       .residual = residual.data,
                                                       .residual_layout = residual.layout,
                                                       .weight = contiguous_of(a.weight, a.weight.type, width),
                                                       .unit_offset = a.unit_offset,
                                                       .y = contiguous_of(a.y, a.x.type, rows * width),
                                                       .summed = contiguous_of(a.summed, residual_dtype, rows * width),
                                                       .rstd = a.rstd.contiguous_as<float>(rows),
                                                       .seed = a.seed.contiguous_as<const int64_t>(1),
                                                       .rows = rows,
                                                       .width = width,
                                                       .eps = a.eps,
                                                       .dropout_p = a.dropout_p,
                                                   });
}
FASTLM_BINDING(rms_norm_residual_forward)

struct rms_norm_residual_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword_or_none("dy"), dsummed = keyword_or_none("dsummed"), summed = keyword("summed"),
         weight = keyword("weight"), rstd = keyword("rstd"), dx = keyword_or_none("dx"),
         dresidual = keyword_or_none("dresidual"), dweight = keyword_or_none("dweight"),
         partials = keyword_or_none("partials"), seed = keyword_or_none("seed");
  bool unit_offset = keyword("unit_offset");
  dtype x_dtype = keyword("x_dtype");
  double dropout_p = keyword("dropout_p");
  launch_target target{keyword("device"), keyword("stream")};
};

static void rms_norm_residual_backward(const rms_norm_residual_backward_arguments& a) {
  const dtype residual_dtype = a.summed.type;
  const int64_t width = a.summed.width, rows = width ? a.summed.count / width : 0;
  const strided_rows<void> summed = strided_rows_of(a.summed, residual_dtype, rows, width),
                           dy = strided_rows_of(a.dy, a.x_dtype, rows, width),
                           dsummed = strided_rows_of(a.dsummed, residual_dtype, rows, width);
  const int64_t padded_width = (width + 7) / 8 * 8;
  a.target.launch(cuda::rms_norm_residual_backward,
                  cuda::rms_norm_residual_backward_args{
                      .x_dtype = launch_dtype(a.x_dtype, "x_dtype"),
                      .residual_dtype = launch_dtype(a.summed),
                      .weight_dtype = launch_dtype(a.weight),
                      .dy = dy.data,
                      .dy_layout = dy.layout,
                      .dsummed = dsummed.data,
                      .dsummed_layout = dsummed.layout,
                      .summed = summed.data,
                      .summed_layout = summed.layout,
                      .weight = contiguous_of(a.weight, a.weight.type, width),
                      .unit_offset = a.unit_offset,
                      .rstd = a.rstd.contiguous_as<const float>(rows),
                      .dx = contiguous_of(a.dx, a.x_dtype, rows * width),
                      .dresidual = contiguous_of(a.dresidual, residual_dtype, rows * width),
                      .dweight = contiguous_of(a.dweight, a.weight.type, width),
                      .partials = a.partials.contiguous_as<float>(
                          a.dweight.given() * cuda::rms_norm_residual_max_partials() * padded_width),
                      .seed = a.seed.contiguous_as<const int64_t>(1),
                      .rows = rows,
                      .width = width,
                      .dropout_p = a.dropout_p,
                  });
}
FASTLM_BINDING(rms_norm_residual_backward)

struct rms_norm_residual_max_partials_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
};

static int64_t rms_norm_residual_max_partials(const rms_norm_residual_max_partials_arguments&) {
  return cuda::rms_norm_residual_max_partials();
}
FASTLM_BINDING(rms_norm_residual_max_partials)

}  // namespace fastlm::bindings
