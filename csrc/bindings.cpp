// Python ↔ kernels. Arguments are addresses and sizes that fastlm/ops has checked; nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <array>
#include <vector>
#include "cpu/adamw.h"
#include "cpu/attention_backward.h"
#include "cpu/gelu_mlp.h"
#include "cpu/layernorm_residual.h"
#include "cpu/linear.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/peak.h"

namespace py = pybind11;
using namespace py::literals;
using namespace fastlm;

using address = uintptr_t;
template <class T> static T* at(address a) { return reinterpret_cast<T*>(a); }

enum class dtype { float32, bfloat16, float16 };

// Runs kernel.operator()<T>() without the GIL, T being the element type.
template <class Kernel> static auto launch(dtype type, Kernel kernel) {
  py::gil_scoped_release nogil;
  switch (type) {
    case dtype::bfloat16: return kernel.template operator()<bf16>();
    case dtype::float16: return kernel.template operator()<fp16>();
    default: return kernel.template operator()<float>();
  }
}

// The same with a second type, which is T or fp32.
template <class Kernel> static auto launch(dtype type, dtype wider, Kernel kernel) {
  return launch(type, [&]<class T>() {
    return wider == dtype::float32 ? kernel.template operator()<T, float>() : kernel.template operator()<T, T>();
  });
}

using strides3 = std::array<int64_t, 3>;
using strides4 = std::array<int64_t, 4>;

template <class T>
static masking<T> masks(address mask, int mask_type_, strides4 mask_strides, address key_padding,
                        std::array<int64_t, 2> key_padding_strides, int64_t lower, int64_t upper, float scale,
                        double dropout_p, int64_t seed) {
  return {at<const void>(mask),
          mask_type(mask_type_),
          mask_strides,
          at<const bool>(key_padding),
          key_padding_strides,
          lower,
          upper,
          scale,
          dropout(dropout_p, seed)};
}

// (batch, heads, key heads, queries, keys, head_dim); the starts are of a packed batch, and empty otherwise.
static attention_size sized(std::array<int64_t, 6> sizes, const std::vector<int64_t>& query_starts,
                            const std::vector<int64_t>& key_starts) {
  attention_size size{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  if (!query_starts.empty()) size.query_starts = query_starts.data(), size.key_starts = key_starts.data();
  return size;
}

static void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](dtype type, address query, strides3 query_strides, address key, strides3 key_strides, address value,
         strides3 value_strides, address out, strides3 out_strides, address lse, address mask, int mask_type,
         strides4 mask_strides, address key_padding, std::array<int64_t, 2> key_padding_strides,
         std::array<int64_t, 6> sizes, const std::vector<int64_t>& query_starts, const std::vector<int64_t>& key_starts,
         float scale, int64_t band_lower, int64_t band_upper, double dropout_p, int64_t seed, int threads) {
        launch(type, [&]<class T>() {
          const attention_size size = sized(sizes, query_starts, key_starts);
          attention_forward<T>({at<const T>(query), query_strides}, {at<const T>(key), key_strides},
                               {at<const T>(value), value_strides}, {at<T>(out), out_strides}, at<float>(lse), size,
                               masks<T>(mask, mask_type, mask_strides, key_padding, key_padding_strides, band_lower,
                                        band_upper, scale, dropout_p, seed),
                               threads);
        });
      },
      "dtype"_a, "query"_a, "query_strides"_a, "key"_a, "key_strides"_a, "value"_a, "value_strides"_a, "out"_a,
      "out_strides"_a, "lse"_a, "mask"_a, "mask_type"_a, "mask_strides"_a, "key_padding"_a, "key_padding_strides"_a,
      "sizes"_a, "query_starts"_a, "key_starts"_a, "scale"_a, "band_lower"_a, "band_upper"_a, "dropout_p"_a, "seed"_a,
      "threads"_a);

  m.def(
      "attention_backward",
      [](dtype type, address dout, strides3 dout_strides, address query, strides3 query_strides, address key,
         strides3 key_strides, address value, strides3 value_strides, address out, strides3 out_strides, address lse,
         address dlse, address mask, int mask_type, strides4 mask_strides, address key_padding,
         std::array<int64_t, 2> key_padding_strides, address dquery, strides3 dquery_strides, address dkey,
         strides3 dkey_strides, address dvalue, strides3 dvalue_strides, address dmask, strides4 dmask_strides,
         std::array<int64_t, 6> sizes, const std::vector<int64_t>& query_starts, const std::vector<int64_t>& key_starts,
         float scale, int64_t band_lower, int64_t band_upper, double dropout_p, int64_t seed, int threads) {
        launch(type, [&]<class T>() {
          const attention_size size = sized(sizes, query_starts, key_starts);
          attention_backward<T>({at<const T>(dout), dout_strides}, {at<const T>(query), query_strides},
                                {at<const T>(key), key_strides}, {at<const T>(value), value_strides},
                                {at<const T>(out), out_strides}, at<const float>(lse), at<const float>(dlse),
                                {{at<T>(dquery), dquery_strides},
                                 {at<T>(dkey), dkey_strides},
                                 {at<T>(dvalue), dvalue_strides},
                                 at<float>(dmask),
                                 dmask_strides},
                                size,
                                masks<T>(mask, mask_type, mask_strides, key_padding, key_padding_strides, band_lower,
                                         band_upper, scale, dropout_p, seed),
                                threads);
        });
      },
      "dtype"_a, "dout"_a, "dout_strides"_a, "query"_a, "query_strides"_a, "key"_a, "key_strides"_a, "value"_a,
      "value_strides"_a, "out"_a, "out_strides"_a, "lse"_a, "dlse"_a, "mask"_a, "mask_type"_a, "mask_strides"_a,
      "key_padding"_a, "key_padding_strides"_a, "dquery"_a, "dquery_strides"_a, "dkey"_a, "dkey_strides"_a, "dvalue"_a,
      "dvalue_strides"_a, "dmask"_a, "dmask_strides"_a, "sizes"_a, "query_starts"_a, "key_starts"_a, "scale"_a,
      "band_lower"_a, "band_upper"_a, "dropout_p"_a, "seed"_a, "threads"_a);
}

static void bind_layernorm_residual(py::module_& m) {
  m.def(
      "layernorm_residual_forward",
      [](dtype x_dtype, dtype residual_dtype, address x, int64_t x_stride, address residual, int64_t residual_stride,
         address weight, address bias, address y, address summed, address mean, address rstd, int64_t rows,
         int64_t width, float eps, double dropout_p, int64_t seed, int threads) {
        launch(x_dtype, residual_dtype, [&]<class T, class R>() {
          layernorm_residual_forward(at<const T>(x), x_stride, at<const R>(residual), residual_stride,
                                     at<const float>(weight), at<const float>(bias), at<T>(y), at<R>(summed),
                                     at<float>(mean), at<float>(rstd), {rows, width}, eps, dropout(dropout_p, seed),
                                     threads);
        });
      },
      "x_dtype"_a, "residual_dtype"_a, "x"_a, "x_stride"_a, "residual"_a, "residual_stride"_a, "weight"_a, "bias"_a,
      "y"_a, "summed"_a, "mean"_a, "rstd"_a, "rows"_a, "width"_a, "eps"_a, "dropout_p"_a, "seed"_a, "threads"_a);

  m.def(
      "layernorm_residual_backward",
      [](dtype x_dtype, dtype residual_dtype, address dy, int64_t dy_stride, address dsummed, int64_t dsummed_stride,
         address summed, int64_t summed_stride, address weight, address mean, address rstd, address dx,
         address dresidual, address dweight, address dbias, int64_t rows, int64_t width, double dropout_p, int64_t seed,
         int threads) {
        launch(x_dtype, residual_dtype, [&]<class T, class R>() {
          layernorm_residual_backward(
              at<const T>(dy), dy_stride, at<const R>(dsummed), dsummed_stride, at<const R>(summed), summed_stride,
              at<const float>(weight), at<const float>(mean), at<const float>(rstd),
              layernorm_gradients<T, R>{at<T>(dx), at<R>(dresidual), at<float>(dweight), at<float>(dbias)},
              {rows, width}, dropout(dropout_p, seed), threads);
        });
      },
      "x_dtype"_a, "residual_dtype"_a, "dy"_a, "dy_stride"_a, "dsummed"_a, "dsummed_stride"_a, "summed"_a,
      "summed_stride"_a, "weight"_a, "mean"_a, "rstd"_a, "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "rows"_a,
      "width"_a, "dropout_p"_a, "seed"_a, "threads"_a);
}

template <class T> static weight_matrix<T> weights(address data, int64_t k_stride, int64_t n_stride) {
  return {at<T>(data), k_stride, n_stride};
}

static void bind_linear(py::module_& m) {
  m.def(
      "linear_forward",
      [](dtype type, address x, int64_t x_stride, address weight, int64_t weight_k_stride, int64_t weight_n_stride,
         address bias, address y, int64_t rows, int64_t k, int64_t n, int threads) {
        launch(type, [&]<class T>() {
          linear_forward(at<const T>(x), x_stride, weights<const T>(weight, weight_k_stride, weight_n_stride),
                         at<const T>(bias), at<T>(y), rows, k, n, threads);
        });
      },
      "dtype"_a, "x"_a, "x_stride"_a, "weight"_a, "weight_k_stride"_a, "weight_n_stride"_a, "bias"_a, "y"_a, "rows"_a,
      "k"_a, "n"_a, "threads"_a);

  m.def(
      "linear_backward",
      [](dtype type, dtype gradients, address dy, int64_t dy_stride, address x, int64_t x_stride, address weight,
         int64_t weight_k_stride, int64_t weight_n_stride, address dx, address dweight, int64_t dweight_k_stride,
         int64_t dweight_n_stride, address dbias, int64_t rows, int64_t k, int64_t n, int threads) {
        launch(type, gradients, [&]<class T, class G>() {
          linear_backward(at<const T>(dy), dy_stride, at<const T>(x), x_stride,
                          weights<const T>(weight, weight_k_stride, weight_n_stride), at<T>(dx),
                          weights<G>(dweight, dweight_k_stride, dweight_n_stride), at<G>(dbias), rows, k, n, threads);
        });
      },
      "dtype"_a, "gradients"_a, "dy"_a, "dy_stride"_a, "x"_a, "x_stride"_a, "weight"_a, "weight_k_stride"_a,
      "weight_n_stride"_a, "dx"_a, "dweight"_a, "dweight_k_stride"_a, "dweight_n_stride"_a, "dbias"_a, "rows"_a, "k"_a,
      "n"_a, "threads"_a);
}

static void bind_gelu_mlp(py::module_& m) {
  m.def(
      "gelu_mlp_forward",
      [](dtype type, address x, int64_t x_stride, address w1, int64_t w1_k_stride, int64_t w1_n_stride, address b1,
         address w2, int64_t w2_k_stride, int64_t w2_n_stride, address b2, address hidden, address activated, address y,
         int64_t rows, int64_t width, int64_t hidden_width, int64_t out_width, bool tanh, int threads) {
        launch(type, [&]<class T>() {
          auto run = tanh ? gelu_mlp_forward<true, T> : gelu_mlp_forward<false, T>;
          run(at<const T>(x), x_stride, weights<const T>(w1, w1_k_stride, w1_n_stride), at<const T>(b1),
              weights<const T>(w2, w2_k_stride, w2_n_stride), at<const T>(b2), at<T>(hidden), at<T>(activated),
              at<T>(y), rows, width, hidden_width, out_width, threads);
        });
      },
      "dtype"_a, "x"_a, "x_stride"_a, "w1"_a, "w1_k_stride"_a, "w1_n_stride"_a, "b1"_a, "w2"_a, "w2_k_stride"_a,
      "w2_n_stride"_a, "b2"_a, "hidden"_a, "activated"_a, "y"_a, "rows"_a, "width"_a, "hidden_width"_a, "out_width"_a,
      "tanh"_a, "threads"_a);

  m.def(
      "gelu_mlp_backward",
      [](dtype type, dtype gradients, address dy, int64_t dy_stride, address x, int64_t x_stride, address w1,
         int64_t w1_k_stride, int64_t w1_n_stride, address b1, address w2, int64_t w2_k_stride, int64_t w2_n_stride,
         address hidden, bool hidden_known, address activated, bool activated_known, address dhidden, address dx,
         address dw1, address db1, address dw2, address db2, int64_t dw1_k_stride, int64_t dw1_n_stride,
         int64_t dw2_k_stride, int64_t dw2_n_stride, int64_t rows, int64_t width, int64_t hidden_width,
         int64_t out_width, bool tanh, int threads) {
        launch(type, gradients, [&]<class T, class G>() {
          auto run = tanh ? gelu_mlp_backward<true, T, G> : gelu_mlp_backward<false, T, G>;
          run(at<const T>(dy), dy_stride, at<const T>(x), x_stride, weights<const T>(w1, w1_k_stride, w1_n_stride),
              at<const T>(b1), weights<const T>(w2, w2_k_stride, w2_n_stride),
              {at<T>(hidden), at<T>(activated), at<T>(dhidden), hidden_known, activated_known},
              {at<T>(dx), weights<G>(dw1, dw1_k_stride, dw1_n_stride), weights<G>(dw2, dw2_k_stride, dw2_n_stride),
               at<G>(db1), at<G>(db2)},
              rows, width, hidden_width, out_width, threads);
        });
      },
      "dtype"_a, "gradients"_a, "dy"_a, "dy_stride"_a, "x"_a, "x_stride"_a, "w1"_a, "w1_k_stride"_a, "w1_n_stride"_a,
      "b1"_a, "w2"_a, "w2_k_stride"_a, "w2_n_stride"_a, "hidden"_a, "hidden_known"_a, "activated"_a,
      "activated_known"_a, "dhidden"_a, "dx"_a, "dw1"_a, "db1"_a, "dw2"_a, "db2"_a, "dw1_k_stride"_a, "dw1_n_stride"_a,
      "dw2_k_stride"_a, "dw2_n_stride"_a, "rows"_a, "width"_a, "hidden_width"_a, "out_width"_a, "tanh"_a, "threads"_a);
}

static void bind_linear_cross_entropy(py::module_& m) {
  m.def(
      "linear_cross_entropy_forward",
      [](dtype type, dtype gradients, address x, int64_t x_stride, address weight, int64_t weight_k_stride,
         int64_t weight_n_stride, address bias, address target, int64_t target_stride, address row_scale, address loss,
         address lse, address logits, int64_t chunk_rows, address dx, address dweight, address dweight_sum,
         address dbias, int64_t rows, int64_t width, int64_t vocab, int64_t ignore_index, float label_smoothing,
         int threads) {
        return launch(type, gradients, [&]<class T, class G>() {
          cross_entropy ce{at<const int64_t>(target),  target_stride,   ignore_index,   label_smoothing,
                           at<const float>(row_scale), at<float>(loss), at<float>(lse), false};
          return linear_cross_entropy(
              at<const T>(x), x_stride, weights<const T>(weight, weight_k_stride, weight_n_stride), at<const T>(bias),
              ce, at<float>(logits), chunk_rows,
              cross_entropy_gradients<T, G>{at<T>(dx), at<G>(dweight), at<float>(dweight_sum), at<G>(dbias)}, rows,
              width, vocab, threads);
        });
      },
      "dtype"_a, "gradients"_a, "x"_a, "x_stride"_a, "weight"_a, "weight_k_stride"_a, "weight_n_stride"_a, "bias"_a,
      "target"_a, "target_stride"_a, "row_scale"_a, "loss"_a, "lse"_a, "logits"_a, "chunk_rows"_a, "dx"_a, "dweight"_a,
      "dweight_sum"_a, "dbias"_a, "rows"_a, "width"_a, "vocab"_a, "ignore_index"_a, "label_smoothing"_a, "threads"_a);
}

using addresses = std::vector<address>;

// T: parameters and gradients, S: moments. Everything has as many entries as sizes; masters may be empty.
template <class T, class S>
static void adamw_of(const addresses& parameters, const addresses& gradients, const addresses& exp_avgs,
                     const addresses& exp_avg_sqs, const addresses& masters, const addresses& steps,
                     const std::vector<int64_t>& sizes, const adamw_hyper& hyper, int threads) {
  std::vector<adamw_tensor<T, S>> tensors;
  for (size_t i = 0; i < sizes.size(); ++i)
    tensors.push_back({at<T>(parameters[i]), at<T>(gradients[i]), at<S>(exp_avgs[i]), at<S>(exp_avg_sqs[i]),
                       masters.empty() ? nullptr : at<float>(masters[i]), at<float>(steps[i])});
  adamw(tensors, sizes, hyper, threads);
}

static void bind_adamw(py::module_& m) {
  m.def(
      "adamw",
      [](dtype type, dtype moments, const addresses& parameters, const addresses& gradients, const addresses& exp_avgs,
         const addresses& exp_avg_sqs, const addresses& masters, const addresses& steps,
         const std::vector<int64_t>& sizes, double lr, double beta1, double beta2, double eps, double weight_decay,
         double factor, bool zero_gradients, int threads) {
        const adamw_hyper hyper{lr, beta1, beta2, eps, weight_decay, factor, zero_gradients};
        launch(type, moments, [&]<class T, class S>() {
          adamw_of<T, S>(parameters, gradients, exp_avgs, exp_avg_sqs, masters, steps, sizes, hyper, threads);
        });
      },
      "dtype"_a, "moments"_a, "parameters"_a, "gradients"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "masters"_a, "steps"_a,
      "sizes"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "factor"_a, "zero_gradients"_a, "threads"_a);

  m.def(
      "sum_of_squares",
      [](dtype type, const addresses& tensors, const std::vector<int64_t>& sizes, int threads) {
        return launch(type, [&]<class T>() {
          std::vector<const T*> pointers;
          for (address tensor : tensors) pointers.push_back(at<const T>(tensor));
          return sum_of_squares(pointers, sizes, threads);
        });
      },
      "dtype"_a, "tensors"_a, "sizes"_a, "threads"_a);
}

PYBIND11_MODULE(FASTLM_MODULE, m) {
  py::enum_<dtype>(m, "dtype")
      .value("float32", dtype::float32)
      .value("bfloat16", dtype::bfloat16)
      .value("float16", dtype::float16);
  bind_adamw(m);
  bind_attention(m);
  bind_gelu_mlp(m);
  bind_layernorm_residual(m);
  bind_linear(m);
  bind_linear_cross_entropy(m);

  m.def(
      "multiply_adds",
      [](dtype type, int64_t rounds, int threads) {
        return launch(type, [=]<class T>() { return multiply_adds<arithmetic_for<T>>(rounds, threads); });
      },
      "dtype"_a, "rounds"_a, "threads"_a);

  m.def(
      "philox_keep",
      [](address out, int64_t rows, int64_t cols, int64_t third, double dropout_p, int64_t seed) {
        const dropout drop(dropout_p, seed);
        float factors[64];
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t group = 0; group * 64 < cols; ++group) {
            keep_factors(drop, group, row, third, factors);
            for (int64_t i = 0; i < 64 && group * 64 + i < cols; ++i)
              at<uint8_t>(out)[row * cols + group * 64 + i] = factors[i] != 0;
          }
      },
      "out"_a, "rows"_a, "cols"_a, "third"_a, "dropout_p"_a, "seed"_a);
}
