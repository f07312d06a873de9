// linear_cross_entropy_forward and linear_cross_entropy_gradient: the arguments of csrc/cuda/linear_cross_entropy.h.
#include "operands.h"
#include "cuda/linear_cross_entropy.h"

namespace fastlm::bindings {

static cuda::cross_entropy_targets targets_of(const tensor& target, const tensor& loss, int64_t rows,
                                              int64_t ignore_index, float label_smoothing, float logit_scale,
                                              float softcap) {
  const int64_t* const indices = target.as<const int64_t>(1);
  check_size(target, "a size of", rows, target.sizes[0]);
  return {{indices, target.strides[0], ignore_index},
          label_smoothing,
          logit_scale,
          softcap,
          loss.contiguous_as<float>(rows)};
}

struct linear_cross_entropy_forward_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), weight = keyword("weight"), bias = keyword_or_none("bias"), target = keyword("target"),
         loss = keyword("loss"), partials = keyword("partials"), shifted_sums = keyword_or_none("shifted_sums"),
         target_logits = keyword("target_logits");
  int64_t ignore_index = keyword("ignore_index");
  float label_smoothing = keyword("label_smoothing"), logit_scale = keyword("logit_scale"),
        softcap = keyword("softcap");
  bool tf32 = keyword("tf32");
  launch_target launch_to{keyword("device"), keyword("stream")};
};

static void linear_cross_entropy_forward(const linear_cross_entropy_forward_arguments& a) {
  const row_view<void> x = rows_of(a.x, a.x.type);
  const weight_view weight(a.weight, a.x.type, false);
  check_size(a.weight, "an input size of", x.width, weight.inputs);
  const int64_t rows = x.count, vocab = weight.outputs;
  const cuda::DType type = launch_dtype(a.x);
  const int64_t num_splits = cuda::linear_cross_entropy_num_splits(type, vocab);
  a.launch_to.launch(
      cuda::linear_cross_entropy_forward,
      cuda::linear_cross_entropy_forward_args{
          .dtype = type,
          .x = x.data,
          .x_stride = x.stride,
          .weight = weight.data,
          .weight_k_stride = weight.input_stride,
          .weight_n_stride = weight.output_stride,
          .bias = contiguous_of(a.bias, a.x.type, vocab),
          .targets = targets_of(a.target, a.loss, rows, a.ignore_index, a.label_smoothing, a.logit_scale, a.softcap),
          .partials = a.partials.contiguous_as<float>(num_splits * rows * 2),
          .shifted_sums = a.shifted_sums.contiguous_as<float>(num_splits * rows),
          .target_logits = a.target_logits.contiguous_as<float>(rows),
          .rows = rows,
          .width = x.width,
          .vocab = vocab,
          .tf32 = a.tf32,
      });
}
FASTLM_BINDING(linear_cross_entropy_forward)

struct linear_cross_entropy_gradient_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor logits = keyword("logits"), target = keyword("target"), row_scale = keyword("row_scale"),
         loss = keyword("loss"), statistics = keyword_or_none("statistics"),
         dbias_partials = keyword_or_none("dbias_partials");
  int64_t ignore_index = keyword("ignore_index");
  float label_smoothing = keyword("label_smoothing"), logit_scale = keyword("logit_scale"),
        softcap = keyword("softcap");
  launch_target launch_to{keyword("device"), keyword("stream")};
};

static void linear_cross_entropy_gradient(const linear_cross_entropy_gradient_arguments& a) {
  a.logits.check_rank(2);
  const row_view<void> logits = rows_of(a.logits, a.logits.type);
  const int64_t rows = logits.count, vocab = logits.width;
  a.statistics.check_rank(2);
  if (a.dbias_partials.given() && (!a.statistics.given() || a.statistics.sizes[1] < rows))
    throw_argument_error(a.statistics.name, "2 rows of at least " + std::to_string(rows), a.statistics.layout());
  a.launch_to.launch(
      cuda::linear_cross_entropy_gradient,
      cuda::linear_cross_entropy_gradient_args{
          .dtype = launch_dtype(a.logits),
          .logits = logits.data,
          .logits_stride = logits.stride,
          .targets = targets_of(a.target, a.loss, rows, a.ignore_index, a.label_smoothing, a.logit_scale, a.softcap),
          .row_scale = a.row_scale.contiguous_as<const float>(rows),
          .statistics = a.statistics.as<float>(),
          .dbias_partials = a.dbias_partials.contiguous_as<float>(cuda::logit_partials(rows) * vocab),
          .rows = rows,
          .vocab = vocab,
      });
}
FASTLM_BINDING(linear_cross_entropy_gradient)

struct linear_cross_entropy_num_splits_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  fastlm::dtype dtype = keyword("dtype");
  int64_t vocab = keyword("vocab");
};

static int64_t linear_cross_entropy_num_splits(const linear_cross_entropy_num_splits_arguments& a) {
  return cuda::linear_cross_entropy_num_splits(launch_dtype(a.dtype, "dtype"), a.vocab);
}
FASTLM_BINDING(linear_cross_entropy_num_splits)

struct linear_cross_entropy_num_partials_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  int64_t rows = keyword("rows");
};

static int64_t linear_cross_entropy_num_partials(const linear_cross_entropy_num_partials_arguments& a) {
  return cuda::logit_partials(a.rows);
}
FASTLM_BINDING(linear_cross_entropy_num_partials)

}  // namespace fastlm::bindings
