// rotary: the arguments of csrc/cuda/rotary.h.
#include "operands.h"
#include "cuda/rotary.h"

namespace fastlm::bindings {

struct rotary_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensor x = keyword("x"), cos = keyword("cos"), sin = keyword("sin"), out = keyword("out");
  bool inverse = keyword("inverse");
  launch_target target{keyword("device"), keyword("stream")};
};

static void check_unit_stride(const tensor& x) {
  if (x.width != 1 && x.strides[x.rank - 1] != 1)
    throw_argument_error(x.name, "a contiguous last dimension", x.layout());
}

static const float* table_of(const tensor& table, const tensor& x, int64_t rotary_dim) {
  const float* const data = table.as<const float>(3);
  check_unit_stride(table);
  if ((table.sizes[0] != 1 && table.sizes[0] != x.sizes[0]) || table.sizes[1] != x.sizes[2] ||
      table.width != rotary_dim || rotary_dim % 2 || rotary_dim > x.width)
    throw_argument_error(table.name, "a table of the batch and tokens of x", table.layout());
  return data;
}

static void rotary(const rotary_arguments& a) {
  const tensor& x = a.x;
  x.check_rank(4);
  check_unit_stride(x);
  const int64_t rotary_dim = a.cos.width;
  a.target.launch(cuda::rotary, cuda::rotary_args{
                                    .dtype = launch_dtype(x),
                                    .x = x.data,
                                    .batch_stride = x.strides[0],
                                    .head_stride = x.strides[1],
                                    .token_stride = x.strides[2],
                                    .cos = table_of(a.cos, x, rotary_dim),
                                    .cos_batch_stride = a.cos.broadcast_stride(0),
                                    .cos_token_stride = a.cos.strides[1],
                                    .sin = table_of(a.sin, x, rotary_dim),
                                    .sin_batch_stride = a.sin.broadcast_stride(0),
                                    .sin_token_stride = a.sin.strides[1],
                                    .out = contiguous_of(a.out, x.type, x.count),
                                    .batch = x.sizes[0],
                                    .heads = x.sizes[1],
                                    .tokens = x.sizes[2],
                                    .head_dim = x.width,
                                    .rotary_dim = rotary_dim,
                                    .inverse = a.inverse,
                                });
}
FASTLM_BINDING(rotary)

}  // namespace fastlm::bindings
