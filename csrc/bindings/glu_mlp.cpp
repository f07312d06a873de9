// glu_mlp_forward and glu_mlp_backward: the arguments of csrc/cpu/glu_mlp.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"
#include "../cpu/glu_mlp.h"

namespace fastlm {
FASTLM_GLU_MLP()
}  // namespace fastlm

namespace fastlm::bindings {

static const weight_layout stored(false);  // as nn.Linear stores weights

struct glu_mlp_inputs : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), w_gate = keyword("w_gate"), w_up = keyword("w_up"), w_down = keyword("w_down"),
         b_gate = keyword_or_none("b_gate"), b_up = keyword_or_none("b_up");

  glu_mlp_sizes sizes(int64_t rows, int64_t width) const {
    w_gate.check_rank(2), w_down.check_rank(2);
    return {rows, width, stored.outputs(w_gate), stored.outputs(w_down)};
  }
  template <class T> glu_mlp_weights<T> weights(const glu_mlp_sizes& s) const {
    return {stored.matrix<const T>(w_gate, s.width, s.hidden), stored.matrix<const T>(w_up, s.width, s.hidden),
            stored.matrix<const T>(w_down, s.hidden, s.out), b_gate.contiguous_as<const T>(s.hidden),
            b_up.contiguous_as<const T>(s.hidden)};
  }
};

struct glu_mlp_forward_arguments : glu_mlp_inputs {
  using glu_mlp_inputs::glu_mlp_inputs;
  tensor b_down = keyword_or_none("b_down"), gate = keyword_or_none("gate"), up = keyword_or_none("up"),
         activated = keyword("activated"), y = keyword("y");
  activation_kind activation = keyword("activation");
  int threads = keyword("threads");
};

static void glu_mlp_forward(const glu_mlp_forward_arguments& a) {
  dispatch(a.x, [&]<class T>() {
    const auto x = a.x.rows<const T>();
    const glu_mlp_sizes sizes = a.sizes(x.count, x.width);
    const int64_t elements = sizes.rows * sizes.hidden;
    if (a.gate.given() != a.up.given()) throw_argument_error("up", "a tensor if gate is one, else None", "the other");
    fastlm::glu_mlp_forward(x.data, x.stride, a.weights<T>(sizes), a.b_down.contiguous_as<const T>(sizes.out),
                            a.gate.contiguous_as<T>(elements), a.up.contiguous_as<T>(elements),
                            a.activated.contiguous_as<T>(elements), a.y.contiguous_as<T>(sizes.rows * sizes.out), sizes,
                            a.activation, a.threads);
  });
}
FASTLM_BINDING(glu_mlp_forward)

struct glu_mlp_backward_arguments : glu_mlp_inputs {
  using glu_mlp_inputs::glu_mlp_inputs;
  tensor dy = keyword("dy"), gate = keyword("gate"), up = keyword("up");
  bool hidden_known = keyword("hidden_known");
  tensor activated = keyword("activated");
  bool activated_known = keyword("activated_known");
  tensor dgate = keyword("dgate"), dup = keyword("dup"), dx = keyword_or_none("dx"),
         dw_gate = keyword_or_none("dw_gate"), dw_up = keyword_or_none("dw_up"), dw_down = keyword_or_none("dw_down"),
         db_gate = keyword_or_none("db_gate"), db_up = keyword_or_none("db_up"), db_down = keyword_or_none("db_down");
  activation_kind activation = keyword("activation");
  int threads = keyword("threads");
};

static void glu_mlp_backward(const glu_mlp_backward_arguments& a) {
  const dtype gradients = gradient_type({&a.dw_gate, &a.dw_up, &a.dw_down, &a.db_gate, &a.db_up, &a.db_down}, a.x.type);
  dispatch(a.x.type, a.x.name, gradients, [&]<class T, class G>() {
    const auto x = a.x.rows<const T>();
    const glu_mlp_sizes sizes = a.sizes(x.count, x.width);
    const auto dy = a.dy.rows<const T>(sizes.rows, sizes.out);
    const int64_t elements = sizes.rows * sizes.hidden;
    fastlm::glu_mlp_backward(
        dy.data, dy.stride, x.data, x.stride, a.weights<T>(sizes),
        glu_mlp_saved<T>{a.gate.contiguous_as<T>(elements), a.up.contiguous_as<T>(elements),
                         a.activated.contiguous_as<T>(elements), a.dgate.contiguous_as<T>(elements),
                         a.dup.contiguous_as<T>(elements), a.hidden_known, a.activated_known},
        glu_mlp_gradients<T, G>{
            a.dx.contiguous_as<T>(sizes.rows * sizes.width), stored.matrix<G>(a.dw_gate, sizes.width, sizes.hidden),
            stored.matrix<G>(a.dw_up, sizes.width, sizes.hidden), stored.matrix<G>(a.dw_down, sizes.hidden, sizes.out),
            a.db_gate.contiguous_as<G>(sizes.hidden), a.db_up.contiguous_as<G>(sizes.hidden),
            a.db_down.contiguous_as<G>(sizes.out)},
        sizes, a.activation, a.threads);
  });
}
FASTLM_BINDING(glu_mlp_backward)

}  // namespace fastlm::bindings
