// linear_log_prob_forward and linear_log_prob_backward: the arguments of csrc/cpu/linear_log_prob.h.
#include "arguments.h"
#include "dispatch.h"
#include "weights.h"
#include "../cpu/linear_log_prob.h"

namespace fastlm::bindings {

struct linear_log_prob_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), weight = keyword("weight"), bias = keyword_or_none("bias"), target = keyword("target"),
         entropy = keyword("entropy"), row_max = keyword("row_max"), row_sum = keyword("row_sum"),
         logits = keyword("logits");
  int64_t ignore_index = keyword("ignore_index");
  float temperature = keyword("temperature"), softcap = keyword("softcap");
  int threads = keyword("threads");

  log_prob_rows of_rows(int64_t rows) const {
    const int64_t* targets = target.as<const int64_t>(1);
    if (target.count != rows)
      throw_argument_error("target", std::to_string(rows) + " elements", std::to_string(target.count));
    return {targets,
            target.strides[0],
            ignore_index,
            temperature,
            softcap,
            nullptr,
            entropy.contiguous_as<float>(rows),
            row_max.contiguous_as<float>(rows),
            row_sum.contiguous_as<float>(rows),
            nullptr,
            nullptr};
  }

  logit_chunks chunks(int64_t vocab) const {
    logits.check_rank(2);
    const int64_t rows = logits.sizes[0];
    return {logits.contiguous_as<float>(rows * vocab), rows, 1, softcap};
  }
};

struct linear_log_prob_forward_arguments : linear_log_prob_arguments {
  using linear_log_prob_arguments::linear_log_prob_arguments;
  tensor log_prob = keyword("log_prob");
};

// −1, or the first row whose target is neither a class nor ignore_index.
static int64_t linear_log_prob_forward(const linear_log_prob_forward_arguments& a) {
  return dispatch(a.x, [&]<class T>() {
    const weight_layout layout(false);
    const auto x = a.x.rows<const T>();
    a.weight.check_rank(2);
    const int64_t rows = x.count, width = x.width, vocab = layout.outputs(a.weight);
    log_prob_rows of = a.of_rows(rows);
    of.log_prob = a.log_prob.contiguous_as<float>(rows);
    return fastlm::linear_log_prob_forward(x.data, x.stride, layout.matrix<const T>(a.weight, width, vocab),
                                           a.bias.contiguous_as<const T>(vocab), of, a.chunks(vocab), rows, width,
                                           vocab, a.threads);
  });
}
FASTLM_BINDING(linear_log_prob_forward)

struct linear_log_prob_backward_arguments : linear_log_prob_arguments {
  using linear_log_prob_arguments::linear_log_prob_arguments;
  tensor dlog_prob = keyword_or_none("dlog_prob"), dentropy = keyword_or_none("dentropy"), dx = keyword_or_none("dx"),
         dweight = keyword_or_none("dweight"), dweight_sum = keyword_or_none("dweight_sum"),
         dbias = keyword_or_none("dbias");
};

static void linear_log_prob_backward(const linear_log_prob_backward_arguments& a) {
  const dtype gradients = gradient_type({&a.dweight, &a.dbias}, a.x.type);
  dispatch(a.x.type, a.x.name, gradients, [&]<class T, class G>() {
    const weight_layout layout(false);
    const auto x = a.x.rows<const T>();
    a.weight.check_rank(2);
    const int64_t rows = x.count, width = x.width, vocab = layout.outputs(a.weight);
    log_prob_rows of = a.of_rows(rows);
    of.dlog_prob = a.dlog_prob.contiguous_as<const float>(rows);
    of.dentropy = a.dentropy.contiguous_as<const float>(rows);
    fastlm::linear_log_prob_backward(
        x.data, x.stride, layout.matrix<const T>(a.weight, width, vocab), a.bias.contiguous_as<const T>(vocab), of,
        a.chunks(vocab),
        logit_gradients<T, G>{a.dx.contiguous_as<T>(rows * width), a.dweight.contiguous_as<G>(vocab * width),
                              a.dweight_sum.contiguous_as<float>(vocab * width), a.dbias.contiguous_as<G>(vocab)},
        rows, width, vocab, a.threads);
  });
}
FASTLM_BINDING(linear_log_prob_backward)

}  // namespace fastlm::bindings
