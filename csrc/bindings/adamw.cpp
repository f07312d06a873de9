// adamw and sum_of_squares: the arguments of csrc/cpu/adamw.h.
#include "arguments.h"
#include "dispatch.h"
#include "../cpu/adamw.h"

namespace fastlm::bindings {

using tensors = std::vector<tensor>;

struct adamw_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  tensors parameters = keyword("parameters"), gradients = keyword("gradients"), exp_avgs = keyword("exp_avgs"),
          exp_avg_sqs = keyword("exp_avg_sqs"), masters = keyword("masters"), steps = keyword("steps");
  double lr = keyword("lr"), beta1 = keyword("beta1"), beta2 = keyword("beta2"), eps = keyword("eps"),
         weight_decay = keyword("weight_decay"), factor = keyword("factor");
  bool zero_gradients = keyword("zero_gradients");
  int threads = keyword("threads");
};

// The elements of a tensor, in the order of its parameter's in memory.
template <class T> static T* elements(const tensor& x, const tensor& parameter) {
  const bool same_order =
      (x.contiguous && parameter.contiguous) || (x.rank == parameter.rank && x.rank <= tensor::MaxRank &&
                                                 std::equal(x.strides, x.strides + x.rank, parameter.strides));
  const bool same_shape =
      x.rank == parameter.rank &&
      (x.rank <= tensor::MaxRank ? std::equal(x.sizes, x.sizes + x.rank, parameter.sizes) : x.count == parameter.count);
  if (x.type != dtype_of<T> || !same_shape || !same_order)
    throw_argument_error(x.name, name_of(dtype_of<T>) + " with the layout of its parameter, " + parameter.layout(),
                         name_of(x.type) + ", " + x.layout());
  return x.as<T>();
}

template <class T, class S> static void update(const adamw_arguments& a) {
  const size_t count = a.parameters.size();
  std::vector<adamw_tensor<T, S>> list;
  std::vector<int64_t> sizes;
  list.reserve(count), sizes.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const tensor& p = a.parameters[i];
    list.push_back({p.as<T>(), elements<T>(a.gradients[i], p), elements<S>(a.exp_avgs[i], p),
                    elements<S>(a.exp_avg_sqs[i], p), a.masters.empty() ? nullptr : elements<float>(a.masters[i], p),
                    a.steps[i].contiguous_as<float>(1)});
    sizes.push_back(p.count);
  }
  const adamw_hyper hyper{a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.factor, a.zero_gradients};
  fastlm::adamw(list, sizes, hyper, a.threads);
}

static void adamw(const adamw_arguments& a) {
  if (a.parameters.empty()) return;
  auto check_count = [&](const char* name, const tensors& list) {
    if (list.size() != a.parameters.size())
      throw_argument_error(name, std::to_string(a.parameters.size()) + " tensors", std::to_string(list.size()));
  };
  check_count("gradients", a.gradients), check_count("exp_avgs", a.exp_avgs);
  check_count("exp_avg_sqs", a.exp_avg_sqs), check_count("steps", a.steps);
  if (!a.masters.empty()) check_count("masters", a.masters);
  dispatch(a.parameters[0].type, "parameters", a.exp_avgs[0].type, [&]<class T, class S>() { update<T, S>(a); });
}
FASTLM_BINDING(adamw)

struct sum_of_squares_arguments : keyword_arguments {
  using keyword_arguments::keyword_arguments;
  std::vector<tensor> tensors = keyword("tensors");
  int threads = keyword("threads");
};

// Tensors may have any layout without gaps: the order of the elements does not matter.
static double sum_of_squares(const sum_of_squares_arguments& a) {
  if (a.tensors.empty()) return 0;
  return dispatch(a.tensors[0], [&]<class T>() {
    std::vector<const T*> pointers;
    std::vector<int64_t> sizes;
    for (const tensor& x : a.tensors) pointers.push_back(x.as<const T>()), sizes.push_back(x.count);
    return fastlm::sum_of_squares(pointers, sizes, a.threads);
  });
}
FASTLM_BINDING(sum_of_squares)

}  // namespace fastlm::bindings
