// linear_cross_entropy_forward: the arguments of csrc/cpu/linear_cross_entropy.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"
#include "../cpu/linear_cross_entropy.h"

namespace fastlm::bindings {

struct linear_cross_entropy_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), weight = keyword("weight"), bias = keyword_or_none("bias"), target = keyword("target"),
         row_scale = keyword_or_none("row_scale"), loss = keyword("loss"), lse = keyword("lse"),
         logits = keyword("logits"), dx = keyword_or_none("dx"), dweight = keyword_or_none("dweight"),
         dweight_sum = keyword_or_none("dweight_sum"), dbias = keyword_or_none("dbias");
  int64_t ignore_index = keyword("ignore_index");
  float label_smoothing = keyword("label_smoothing"), logit_scale = keyword("logit_scale"),
        softcap = keyword("softcap");
  int threads = keyword("threads");
};

// −1, or the first row whose target is neither a class nor ignore_index.
static int64_t linear_cross_entropy_forward(const linear_cross_entropy_forward_arguments& a) {
  const dtype gradients = gradient_type({&a.dweight, &a.dbias}, a.x.type);
  return dispatch(a.x.type, a.x.name, gradients, [&]<class T, class G>() {
    const weight_layout layout(false);
    const auto x = a.x.rows<const T>();
    a.weight.check_rank(2), a.logits.check_rank(2);
    const int64_t rows = x.count, width = x.width, vocab = layout.outputs(a.weight), chunk_rows = a.logits.sizes[0];
    const int64_t* target = a.target.as<const int64_t>(1);
    if (a.target.count != rows)
      throw_argument_error("target", std::to_string(rows) + " elements", std::to_string(a.target.count));
    const cross_entropy ce{target,
                           a.target.strides[0],
                           a.ignore_index,
                           a.label_smoothing,
                           a.logit_scale,
                           a.softcap,
                           a.row_scale.contiguous_as<const float>(rows),
                           a.loss.contiguous_as<float>(rows),
                           a.lse.contiguous_as<float>(rows),
                           false};
    return linear_cross_entropy(
        x.data, x.stride, layout.matrix<const T>(a.weight, width, vocab), a.bias.contiguous_as<const T>(vocab), ce,
        {a.logits.contiguous_as<float>(chunk_rows * vocab), chunk_rows, a.logit_scale, a.softcap},
        logit_gradients<T, G>{a.dx.contiguous_as<T>(rows * width), a.dweight.contiguous_as<G>(vocab * width),
                              a.dweight_sum.contiguous_as<float>(vocab * width), a.dbias.contiguous_as<G>(vocab)},
        rows, width, vocab, a.threads);
  });
}
FASTLM_BINDING(linear_cross_entropy_forward)

}  // namespace fastlm::bindings
