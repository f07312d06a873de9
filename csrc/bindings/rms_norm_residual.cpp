// rms_norm_residual_forward and rms_norm_residual_backward: the arguments of csrc/cpu/rms_norm_residual.h.
#include "arguments.h"
#include "dispatch.h"
#include "strided_rows.h"
#include "../cpu/rms_norm_residual.h"

namespace fastlm {
FASTLM_RMS_NORM()
}  // namespace fastlm

namespace fastlm::bindings {

struct rms_norm_residual_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), residual = keyword_or_none("residual"), weight = keyword("weight"), y = keyword("y"),
         summed = keyword_or_none("summed"), rstd = keyword("rstd");
  float eps = keyword("eps");
  bool unit_offset = keyword("unit_offset");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void rms_norm_residual_forward(const rms_norm_residual_forward_arguments& a) {
  const dtype residual_type = a.residual.given() ? a.residual.type : a.x.type;
  dispatch(a.x.type, a.x.name, residual_type, [&]<class T, class R>() {
    const int64_t width = a.x.width, rows = width ? a.x.count / width : 0;
    const auto x = strided_rows_of<const T>(a.x, rows, width);
    const auto residual = strided_rows_of<const R>(a.residual, rows, width);
    fastlm::rms_norm_residual_forward(x, residual, {fp32_parameters(a.weight, width), a.unit_offset},
                                      a.y.contiguous_as<T>(rows * width), a.summed.contiguous_as<R>(rows * width),
                                      a.rstd.contiguous_as<float>(rows), {rows, width}, a.eps, {a.dropout_p, a.seed},
                                      a.threads);
  });
}
FASTLM_BINDING(rms_norm_residual_forward)

struct rms_norm_residual_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword_or_none("dy"), dsummed = keyword_or_none("dsummed"), summed = keyword("summed"),
         weight = keyword("weight"), rstd = keyword("rstd"), dx = keyword_or_none("dx"),
         dresidual = keyword_or_none("dresidual"), dweight = keyword_or_none("dweight");
  bool unit_offset = keyword("unit_offset");
  dtype x_dtype = keyword("x_dtype");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void rms_norm_residual_backward(const rms_norm_residual_backward_arguments& a) {
  dispatch(a.x_dtype, "x_dtype", a.summed.type, [&]<class T, class R>() {
    const int64_t width = a.summed.width, rows = width ? a.summed.count / width : 0;
    const auto summed = strided_rows_of<const R>(a.summed, rows, width);
    const auto dy = strided_rows_of<const T>(a.dy, rows, width);
    const auto dsummed = strided_rows_of<const R>(a.dsummed, rows, width);
    fastlm::rms_norm_residual_backward(
        dy, dsummed, summed, {fp32_parameters(a.weight, width), a.unit_offset}, a.rstd.contiguous_as<const float>(rows),
        rms_norm_gradients<T, R>{a.dx.contiguous_as<T>(rows * width), a.dresidual.contiguous_as<R>(rows * width),
                                 a.dweight.contiguous_as<float>(width)},
        {rows, width}, {a.dropout_p, a.seed}, a.threads);
  });
}
FASTLM_BINDING(rms_norm_residual_backward)

}  // namespace fastlm::bindings
