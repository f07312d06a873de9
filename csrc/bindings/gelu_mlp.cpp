// gelu_mlp_forward and gelu_mlp_backward: the arguments of csrc/cpu/gelu_mlp.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"
#include "../cpu/gelu_mlp.h"

namespace fastlm {
FASTLM_GELU_MLP()
}  // namespace fastlm

namespace fastlm::bindings {

struct gelu_mlp_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), w1 = keyword("w1"), b1 = keyword_or_none("b1"), w2 = keyword("w2"),
         b2 = keyword_or_none("b2"), hidden = keyword_or_none("hidden"), activated = keyword("activated"),
         y = keyword("y");
  bool conv1d = keyword("conv1d"), tanh = keyword("tanh");
  int threads = keyword("threads");
};

static void gelu_mlp_forward(const gelu_mlp_forward_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    const weight_layout layout(a.conv1d);
    const auto x = a.x.rows<const T>();
    a.w1.check_rank(2), a.w2.check_rank(2);
    const int64_t rows = x.count, width = x.width, hidden_width = layout.outputs(a.w1),
                  out_width = layout.outputs(a.w2);
    auto run = a.tanh ? fastlm::gelu_mlp_forward<true, T> : fastlm::gelu_mlp_forward<false, T>;
    run(x.data, x.stride, layout.matrix<const T>(a.w1, width, hidden_width), a.b1.contiguous_as<const T>(hidden_width),
        layout.matrix<const T>(a.w2, hidden_width, out_width), a.b2.contiguous_as<const T>(out_width),
        a.hidden.contiguous_as<T>(rows * hidden_width), a.activated.contiguous_as<T>(rows * hidden_width),
        a.y.contiguous_as<T>(rows * out_width), rows, width, hidden_width, out_width, a.threads);
  });
}
FASTLM_BINDING(gelu_mlp_forward)

struct gelu_mlp_backward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor dy = keyword("dy"), x = keyword("x"), w1 = keyword("w1"), b1 = keyword_or_none("b1"), w2 = keyword("w2"),
         hidden = keyword("hidden");
  bool hidden_known = keyword("hidden_known");
  tensor activated = keyword("activated");
  bool activated_known = keyword("activated_known");
  tensor dhidden = keyword("dhidden"), dx = keyword_or_none("dx"), dw1 = keyword_or_none("dw1"),
         db1 = keyword_or_none("db1"), dw2 = keyword_or_none("dw2"), db2 = keyword_or_none("db2");
  bool conv1d = keyword("conv1d"), tanh = keyword("tanh");
  int threads = keyword("threads");
};

static void gelu_mlp_backward(const gelu_mlp_backward_arguments& a) {
  const dtype gradients = gradient_type({&a.dw1, &a.db1, &a.dw2, &a.db2}, a.x.type);
  dispatch(a.x.type, a.x.name, gradients, [&]<class T, class G>() {
    const weight_layout layout(a.conv1d);
    const auto x = a.x.rows<const T>();
    a.w1.check_rank(2), a.w2.check_rank(2);
    const int64_t rows = x.count, width = x.width, hidden_width = layout.outputs(a.w1),
                  out_width = layout.outputs(a.w2), hidden_count = rows * hidden_width;
    const auto dy = a.dy.rows<const T>(rows, out_width);
    auto run = a.tanh ? fastlm::gelu_mlp_backward<true, T, G> : fastlm::gelu_mlp_backward<false, T, G>;
    run(dy.data, dy.stride, x.data, x.stride, layout.matrix<const T>(a.w1, width, hidden_width),
        a.b1.contiguous_as<const T>(hidden_width), layout.matrix<const T>(a.w2, hidden_width, out_width),
        {a.hidden.contiguous_as<T>(hidden_count), a.activated.contiguous_as<T>(hidden_count),
         a.dhidden.contiguous_as<T>(hidden_count), a.hidden_known, a.activated_known},
        {a.dx.contiguous_as<T>(rows * width), layout.matrix<G>(a.dw1, width, hidden_width),
         layout.matrix<G>(a.dw2, hidden_width, out_width), a.db1.contiguous_as<G>(hidden_width),
         a.db2.contiguous_as<G>(out_width)},
        rows, width, hidden_width, out_width, a.threads);
  });
}
FASTLM_BINDING(gelu_mlp_backward)

}  // namespace fastlm::bindings
