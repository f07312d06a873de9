// layernorm_residual_forward and layernorm_residual_backward: the arguments of csrc/cpu/layernorm_residual.h.
#include "arguments.h"
#include "dispatch.h"
#include "../cpu/layernorm_residual.h"

namespace fastlm {
FASTLM_LAYERNORM()
}  // namespace fastlm

namespace fastlm::bindings {

struct layernorm_residual_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), residual = keyword_or_none("residual"), weight = keyword("weight"),
         bias = keyword_or_none("bias"), y = keyword("y"), summed = keyword_or_none("summed"), mean = keyword("mean"),
         rstd = keyword("rstd");
  float eps = keyword("eps");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void layernorm_residual_forward(const layernorm_residual_forward_arguments& a) {
  const dtype residual_type = a.residual.given() ? a.residual.type : a.x.type;
  dispatch(a.x.type, a.x.name, residual_type, [&]<class T, class R>() {
    const auto x = a.x.rows<const T>();
    const auto residual = a.residual.rows<const R>(x.count, x.width);
    const int64_t rows = x.count, width = x.width;
    fastlm::layernorm_residual_forward(x.data, x.stride, residual.data, residual.stride,
                                       fp32_parameters(a.weight, width), fp32_parameters(a.bias, width),
                                       a.y.contiguous_as<T>(rows * width), a.summed.contiguous_as<R>(rows * width),
                                       a.mean.contiguous_as<float>(rows), a.rstd.contiguous_as<float>(rows),
                                       {rows, width}, a.eps, {a.dropout_p, a.seed}, a.threads);
  });
}
FASTLM_BINDING(layernorm_residual_forward)

struct layernorm_residual_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword_or_none("dy"), dsummed = keyword_or_none("dsummed"), summed = keyword("summed"),
         weight = keyword("weight"), mean = keyword("mean"), rstd = keyword("rstd"), dx = keyword_or_none("dx"),
         dresidual = keyword_or_none("dresidual"), dweight = keyword_or_none("dweight"),
         dbias = keyword_or_none("dbias");
  dtype x_dtype = keyword("x_dtype");
  double dropout_p = keyword("dropout_p");
  int64_t seed = keyword("seed");
  int threads = keyword("threads");
};

static void layernorm_residual_backward(const layernorm_residual_backward_arguments& a) {
  dispatch(a.x_dtype, "x_dtype", a.summed.type, [&]<class T, class R>() {
    const auto summed = a.summed.rows<const R>();
    const int64_t rows = summed.count, width = summed.width;
    const auto dy = a.dy.rows<const T>(rows, width);
    const auto dsummed = a.dsummed.rows<const R>(rows, width);
    fastlm::layernorm_residual_backward(
        dy.data, dy.stride, dsummed.data, dsummed.stride, summed.data, summed.stride, fp32_parameters(a.weight, width),
        a.mean.contiguous_as<const float>(rows), a.rstd.contiguous_as<const float>(rows),
        layernorm_gradients<T, R>{a.dx.contiguous_as<T>(rows * width), a.dresidual.contiguous_as<R>(rows * width),
                                  a.dweight.contiguous_as<float>(width), a.dbias.contiguous_as<float>(width)},
        {rows, width}, {a.dropout_p, a.seed}, a.threads);
  });
}
FASTLM_BINDING(layernorm_residual_backward)

}  // namespace fastlm::bindings
