// linear_log_prob_forward and linear_log_prob_backward: the arguments of csrc/cuda/linear_log_prob.h.
#include "operands.h"
#include "cuda/linear_log_prob.h"

namespace fastlm::bindings {

struct log_prob_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor logits = keyword("logits"), target = keyword("target"), entropy = keyword("entropy"),
         row_max = keyword("row_max"), row_sum = keyword("row_sum");
  int64_t ignore_index = keyword("ignore_index");
  float temperature = keyword("temperature"), softcap = keyword("softcap");
  launch_target launch_to{keyword("device"), keyword("stream")};

  cuda::log_prob_chunk chunk() const {
    logits.check_rank(2);
    const row_view<void> rows = rows_of(logits, logits.type);
    const int64_t* const indices = target.as<const int64_t>(1);
    check_size(target, "a size of", rows.count, target.sizes[0]);
    return {
        .dtype = launch_dtype(logits),
        .logits = rows.data,
        .logits_stride = rows.stride,
        .rows = rows.count,
        .vocab = rows.width,
        .targets = {indices, target.strides[0], ignore_index},
        .temperature = temperature,
        .softcap = softcap,
    };
  }
};

struct linear_log_prob_forward_arguments : log_prob_arguments {
  using log_prob_arguments::log_prob_arguments;
  tensor log_prob = keyword("log_prob");
};

static void linear_log_prob_forward(const linear_log_prob_forward_arguments& a) {
  const cuda::log_prob_chunk chunk = a.chunk();
  a.launch_to.launch(cuda::linear_log_prob_forward, cuda::linear_log_prob_forward_args{
                                                        .chunk = chunk,
                                                        .log_prob = a.log_prob.contiguous_as<float>(chunk.rows),
                                                        .entropy = a.entropy.contiguous_as<float>(chunk.rows),
                                                        .row_max = a.row_max.contiguous_as<float>(chunk.rows),
                                                        .row_sum = a.row_sum.contiguous_as<float>(chunk.rows),
                                                    });
}
FASTLM_BINDING(linear_log_prob_forward)

struct linear_log_prob_backward_arguments : log_prob_arguments {
  using log_prob_arguments::log_prob_arguments;
  tensor dlog_prob = keyword_or_none("dlog_prob"), dentropy = keyword_or_none("dentropy"),
         dbias_partials = keyword_or_none("dbias_partials");
};

static void linear_log_prob_backward(const linear_log_prob_backward_arguments& a) {
  const cuda::log_prob_chunk chunk = a.chunk();
  const int64_t rows = chunk.rows;
  a.launch_to.launch(
      cuda::linear_log_prob_backward,
      cuda::linear_log_prob_backward_args{
          .chunk = chunk,
          .dlog_prob = a.dlog_prob.contiguous_as<const float>(rows),
          .dentropy = a.dentropy.contiguous_as<const float>(rows),
          .entropy = a.entropy.contiguous_as<const float>(rows),
          .row_max = a.row_max.contiguous_as<const float>(rows),
          .row_sum = a.row_sum.contiguous_as<const float>(rows),
          .dbias_partials = a.dbias_partials.contiguous_as<float>(cuda::logit_partials(rows) * chunk.vocab),
      });
}
FASTLM_BINDING(linear_log_prob_backward)

}  // namespace fastlm::bindings
