// linear_forward and linear_backward: the arguments of csrc/cpu/linear.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"

namespace fastlm {
FASTLM_SMALL_M()
FASTLM_LINEAR()
}  // namespace fastlm

namespace fastlm::bindings {

struct linear_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), weight = keyword("weight"), bias = keyword_or_none("bias"), y = keyword("y");
  bool conv1d = keyword("conv1d");
  int threads = keyword("threads");
};

static void linear_forward(const linear_forward_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    const weight_layout layout(a.conv1d);
    const auto x = a.x.rows<const T>();
    a.weight.check_rank(2);
    const int64_t k = x.width, n = layout.outputs(a.weight);
    fastlm::linear_forward(x.data, x.stride, layout.matrix<const T>(a.weight, k, n), a.bias.contiguous_as<const T>(n),
                           a.y.contiguous_as<T>(x.count * n), x.count, k, n, a.threads);
  });
}
FASTLM_BINDING(linear_forward)

struct linear_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword("dy"), x = keyword("x"), weight = keyword("weight"), dx = keyword_or_none("dx"),
         dweight = keyword_or_none("dweight"), dbias = keyword_or_none("dbias");
  bool conv1d = keyword("conv1d");
  int threads = keyword("threads");
};

static void linear_backward(const linear_backward_arguments& a) {
  const dtype gradients = gradient_type({&a.dweight, &a.dbias}, a.x.type);
  dispatch(a.x.type, a.x.name, gradients, [&]<class T, class G>() {
    const weight_layout layout(a.conv1d);
    const auto x = a.x.rows<const T>();
    a.weight.check_rank(2);
    const int64_t rows = x.count, k = x.width, n = layout.outputs(a.weight);
    const auto dy = a.dy.rows<const T>(rows, n);
    fastlm::linear_backward(dy.data, dy.stride, x.data, x.stride, layout.matrix<const T>(a.weight, k, n),
                            a.dx.contiguous_as<T>(rows * k), layout.matrix<G>(a.dweight, k, n),
                            a.dbias.contiguous_as<G>(n), rows, k, n, a.threads);
  });
}
FASTLM_BINDING(linear_backward)

}  // namespace fastlm::bindings
