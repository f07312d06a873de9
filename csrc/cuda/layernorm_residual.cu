// s = residual + dropout(x),  y = (s − mean)·rstd·w + b,  rstd = 1/√(var + eps)
//
// Memory-bound. Forward reads x and residual and writes s and y: 8 bytes per element in 16 bits. Backward reads dy, s
// and ds and writes dresidual, and dx if dropout or its dtype makes it a tensor of its own: 8 or 10 bytes. About 10 and
// 15 FLOPs per element; dropout adds 8 Philox calls per 32 elements, about 25 integer instructions per element, which
// take less time than the memory accesses. s is normalised as it is stored, rounded to the dtype of residual. The
// variance is two-pass.
//
// Layout:
//   - A row is held in registers, 32 columns per thread, by a team of 8 to 256 threads, so x and residual are read once
//     up to a width of 8192. Accesses are vectors of 8 columns, 16 bytes in 16 bits. With dropout the four vectors of a
//     thread are 16 columns apart, so each Philox call gives four of its columns.
//   - Backward: two blocks per multiprocessor process several rows each and keep their partial sums of dw and db in
//     registers; a second kernel reduces them in a fixed order, without atomics. The partial sums are up to
//     2 · multiprocessors · width · 8 bytes, written and read, mostly in the L2 cache.
//   - Backward copies dy, s and ds of the next row to shared memory while it computes, each thread its own columns. In
//     registers they would not fit beside the partial sums.
//   - Wider rows, and rows that are not aligned for vectors, have generic kernels that process a column at a time and
//     read it again in each pass. Separate kernels keep these branches out of the ones above.
#include "layernorm_residual.h"
#include "residual_norm.cuh"

namespace fastlm::cuda {

template <class T, class R> struct forward_args {
  const T* x;
  int64_t x_stride;
  const R* residual;
  int64_t residual_stride;
  const void *weight, *bias;
  bool float_weights;  // weight and bias are float, otherwise T
  T* y;
  R* summed;
  float *mean, *rstd;
  int64_t rows;
  int width, team;
  float eps;
  dropout drop;
};

template <class T, class R> struct backward_args {
  const T* dy;
  int64_t dy_stride;
  const R* dsummed;
  int64_t dsummed_stride;
  const R* summed;
  int64_t summed_stride;
  const void* weight;
  bool float_weights;
  const float *mean, *rstd;
  T* dx;
  R* dresidual;
  float *dweight, *dbias;  // partial sums, one row of padded_width columns per block
  int64_t rows;
  int width, padded_width, team, rows_per_team;
  dropout drop;
};

// The statistics of a row, of Σ (s − mean) and Σ (s − mean)² by a rounded mean. Where all elements are large and nearly
// equal its error is large beside the deviations, so it is corrected. 1/√(var + eps) is NaN where the sum of squares
// overflows: a factor of 0 would give the bias as the result.
struct row_statistics {
  float correction, mean, rstd;

  FASTLM_DEVICE row_statistics(float rounded_mean, const float (&deviations)[2], float width, float eps)
      : correction(deviations[0] / width), mean(rounded_mean + correction) {
    const float variance = maximum(deviations[1] / width - correction * correction, 0.0f);
    rstd = deviations[1] < INFINITY ? 1.0f / sqrtf(variance + eps) : NAN;
  }
};

template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM, 2)
    layernorm_residual_forward_kernel(const forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  const int width = args.width, end = row < args.rows ? width : 0;

  vec<T, VECTOR> x[VECTORS];
  vec<R, VECTOR> residual[VECTORS];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int column = team.column(c);
    x[c] = {}, residual[c] = {};
    if (column < end) x[c] = vec<T, VECTOR>::load(args.x + row * args.x_stride + column);
    if (column < end && args.residual)
      residual[c] = vec<R, VECTOR>::load(args.residual + row * args.residual_stride + column);
  }
  float s[VECTORS][VECTOR];
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) s[c][i] = to_float(x[c][i]);
  if (args.drop.active()) apply_dropout(s, args.drop, row, team.column(0));
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    vec<R, VECTOR> stored;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      stored[i] = from_float<R>(s[c][i] + to_float(residual[c][i]));
      s[c][i] = to_float(stored[i]);
    }
    if (args.summed && team.column(c) < end) stored.store(args.summed + row * width + team.column(c));
  }

  float sum_of_row[1] = {}, deviations[2] = {};
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum_of_row[0] += s[c][i];
  team.sum(sum_of_row, sums);
  const float mean = sum_of_row[0] / float(width);
#pragma unroll
  for (int c = 0; c < VECTORS; ++c)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      s[c][i] -= mean;
      if (team.column(c) < end) deviations[0] += s[c][i], deviations[1] += s[c][i] * s[c][i];
    }
  team.sum(deviations, sums);
  const row_statistics statistics(mean, deviations, float(width), args.eps);
  const float rstd = statistics.rstd;
  if (row < args.rows && team.thread == 0) args.mean[row] = statistics.mean, args.rstd[row] = rstd;
#pragma unroll
  for (int c = 0; c < VECTORS; ++c) {
    const int column = team.column(c);
    if (column >= end) continue;
    float weight[VECTOR], bias[VECTOR] = {};
    load_parameters<T>(weight, args.weight, args.float_weights, column);
    if (args.bias) load_parameters<T>(bias, args.bias, args.float_weights, column);
    vec<T, VECTOR> y;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      y[i] = from_float<T>((s[c][i] - statistics.correction) * rstd * weight[i] + bias[i]);
    y.store(args.y + row * width + column);
  }
}

// ds = rstd·(g − mean(g) − n·mean(g·n)) + dsummed,  n = (s − mean)·rstd,  g = dy·w;  dresidual = ds,  dx = dropout(ds);
// dw = Σ_rows dy·n,  db = Σ_rows dy
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM, 1)
    layernorm_residual_backward_kernel(const backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(args.team, args.drop.active());
  const int width = args.width;
  float dweight[VECTORS][VECTOR] = {}, dbias[VECTORS][VECTOR] = {};
  const row_slots<T> dy_slots{shared + sums_bytes(2)};
  const row_slots<R> s_slots{dy_slots.base + blockDim.x * row_slots<T>::bytes_per_thread},
      dsummed_slots{s_slots.base + blockDim.x * row_slots<R>::bytes_per_thread};
  const auto row_of = [&](int step) {
    return (int64_t(blockIdx.x) * args.rows_per_team + step) * team.teams + team.index;
  };
  const auto exists = [&](int step) { return step < args.rows_per_team && row_of(step) < args.rows; };
  const auto prefetch = [&](int step) {
    if (!args.dy || !exists(step)) return;
    const int64_t row = row_of(step);
    dy_slots.prefetch(args.dy + row * args.dy_stride, team, width);
    s_slots.prefetch(args.summed + row * args.summed_stride, team, width);
    cp_async_commit();
  };
  const auto prefetch_dsummed = [&](int step) {
    if (!args.dsummed || !exists(step)) return;
    const int64_t row = row_of(step);
    dsummed_slots.prefetch(args.dsummed + row * args.dsummed_stride, team, width);
    cp_async_commit();
  };
  prefetch(0), prefetch_dsummed(0);
#pragma unroll 1
  for (int step = 0; step < args.rows_per_team; ++step) {
    const int64_t row = row_of(step);
    const int end = row < args.rows ? width : 0;
    vec<T, VECTOR> dy[VECTORS] = {};
    vec<R, VECTOR> s[VECTORS] = {};
    cp_async_wait<0>();
    if (end > 0 && args.dy) dy_slots.take(dy), s_slots.take(s);
    __syncwarp();  // orders the reads before the copies that overwrite what they read
    prefetch(step + 1);
    float ds[VECTORS][VECTOR] = {};
    if (args.dy) {
      const float mean = row < args.rows ? args.mean[row] : 0.0f, rstd = row < args.rows ? args.rstd[row] : 0.0f;
      float n[VECTORS][VECTOR], row_sums[2] = {};
#pragma unroll
      for (int c = 0; c < VECTORS; ++c) {
        const int column = team.column(c);
        float weight[VECTOR] = {};
        if (column < end) load_parameters<T>(weight, args.weight, args.float_weights, column);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          n[c][i] = column < end ? (to_float(s[c][i]) - mean) * rstd : 0.0f;
          ds[c][i] = to_float(dy[c][i]) * weight[i];
          row_sums[0] += ds[c][i];
          row_sums[1] += ds[c][i] * n[c][i];
          dweight[c][i] += to_float(dy[c][i]) * n[c][i];
          dbias[c][i] += to_float(dy[c][i]);
        }
      }
      team.sum(row_sums, sums);
      const float mean_g = row_sums[0] / float(width), mean_gn = row_sums[1] / float(width);
#pragma unroll
      for (int c = 0; c < VECTORS; ++c)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) ds[c][i] = rstd * (ds[c][i] - mean_g - n[c][i] * mean_gn);
    }
    vec<R, VECTOR> dsummed[VECTORS] = {};  // read here, where fewer registers are in use
    if (end > 0 && args.dsummed) dsummed_slots.take(dsummed);
    __syncwarp();
    prefetch_dsummed(step + 1);
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      vec<R, VECTOR> out;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        ds[c][i] += to_float(dsummed[c][i]);
        out[i] = from_float<R>(ds[c][i]);
      }
      if (args.dresidual && team.column(c) < end) out.store(args.dresidual + row * width + team.column(c));
    }
    if (!args.dx) continue;
    if (args.drop.active()) apply_dropout(ds, args.drop, row, team.column(0));
#pragma unroll
    for (int c = 0; c < VECTORS; ++c) {
      vec<T, VECTOR> out;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) out[i] = from_float<T>(ds[c][i]);
      if (team.column(c) < end) out.store(args.dx + row * width + team.column(c));
    }
  }
  __syncthreads();  // other teams may still read what they have copied
  if (args.dweight)
    combine_partials(team, dweight, sums, args.dweight + int64_t(blockIdx.x) * args.padded_width, width);
  if (args.dbias) combine_partials(team, dbias, sums, args.dbias + int64_t(blockIdx.x) * args.padded_width, width);
}

// Any width and alignment, a column at a time: thread t has columns t, t + threads, … A block is one team.
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM)
    layernorm_residual_forward_generic_kernel(const forward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int64_t row = blockIdx.x;
  const int width = args.width, first = int(threadIdx.x);
  const T* x = args.x + row * args.x_stride;
  R* summed = args.summed + row * width;
  const auto s = [&](int column) { return args.summed ? to_float(summed[column]) : to_float(x[column]); };  // as stored
  float sum_of_row[1] = {}, deviations[2] = {};
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    float sum = to_float(x[column]);
    if (args.drop.active())
      sum = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                ? sum * args.drop.scale
                : 0.0f;
    if (args.residual) sum += to_float(args.residual[row * args.residual_stride + column]);
    if (args.summed) {
      summed[column] = from_float<R>(sum);
      sum = to_float(summed[column]);
    }
    sum_of_row[0] += sum;
  }
  team.sum(sum_of_row, sums);
  const float first_mean = sum_of_row[0] / float(width);
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    const float deviation = s(column) - first_mean;
    deviations[0] += deviation, deviations[1] += deviation * deviation;
  }
  team.sum(deviations, sums);
  const row_statistics statistics(first_mean, deviations, float(width), args.eps);
  const float mean = statistics.mean, rstd = statistics.rstd;
  if (first == 0) args.mean[row] = mean, args.rstd[row] = rstd;
#pragma unroll 1
  for (int column = first; column < width; column += team.size) {
    const float normalized = (s(column) - mean) * rstd * parameter<T>(args.weight, args.float_weights, column);
    args.y[row * width + column] =
        from_float<T>(args.bias ? normalized + parameter<T>(args.bias, args.float_weights, column) : normalized);
  }
}

// The partial sums are kept in memory: each thread adds to its own columns.
template <class T, class R> __global__ void __launch_bounds__(MAX_TEAM)
    layernorm_residual_backward_generic_kernel(const backward_args<T, R> args) {
  FASTLM_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const row_team team(int(blockDim.x), false);
  const int width = args.width, first = int(threadIdx.x);
  float *dweight = args.dweight + int64_t(blockIdx.x) * args.padded_width,
        *dbias = args.dbias + int64_t(blockIdx.x) * args.padded_width;
#pragma unroll 1
  for (int step = 0; step < args.rows_per_team; ++step) {
    const int64_t row = int64_t(blockIdx.x) * args.rows_per_team + step;
    if (row >= args.rows) return;  // in all threads; the first row of a block exists
    const T* dy_row = args.dy + row * args.dy_stride;
    const R* s = args.summed + row * args.summed_stride;
    const float mean = args.mean[row], rstd = args.rstd[row];
    float row_sums[2] = {};
    if (args.dy) {
#pragma unroll 1
      for (int column = first; column < width; column += team.size) {
        const float dy = to_float(dy_row[column]), n = (to_float(s[column]) - mean) * rstd;
        const float g = dy * parameter<T>(args.weight, args.float_weights, column);
        row_sums[0] += g;
        row_sums[1] += g * n;
        if (args.dweight) dweight[column] = (step ? dweight[column] : 0.0f) + dy * n;
        if (args.dbias) dbias[column] = (step ? dbias[column] : 0.0f) + dy;
      }
      team.sum(row_sums, sums);
    }
    const float mean_g = row_sums[0] / float(width), mean_gn = row_sums[1] / float(width);
#pragma unroll 1
    for (int column = first; column < width; column += team.size) {
      float ds = 0.0f;
      if (args.dy) {
        const float n = (to_float(s[column]) - mean) * rstd;
        ds = rstd *
             (to_float(dy_row[column]) * parameter<T>(args.weight, args.float_weights, column) - mean_g - n * mean_gn);
      }
      if (args.dsummed) ds += to_float(args.dsummed[row * args.dsummed_stride + column]);
      if (args.dresidual) args.dresidual[row * width + column] = from_float<R>(ds);
      if (!args.dx) continue;
      if (args.drop.active())
        ds = kept(uint64_t(*args.drop.seed), args.drop.threshold, uint32_t(column), uint32_t(row), 0)
                 ? ds * args.drop.scale
                 : 0.0f;
      args.dx[row * width + column] = from_float<T>(ds);
    }
  }
}

void layernorm_residual_forward(const layernorm_residual_forward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool in_registers = fits_in_registers(args.width) && aligned(args.x, args.x_stride) &&
                            aligned(args.residual, args.residual_stride) && aligned(args.weight, 0) &&
                            aligned(args.bias, 0) && aligned(args.y, 0) && aligned(args.summed, 0);
  const row_partition partition("layernorm_residual", args.rows, args.width, in_registers);
  dispatch_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const forward_args<T, R> kernel_args{.x = static_cast<const T*>(args.x),
                                         .x_stride = args.x_stride,
                                         .residual = static_cast<const R*>(args.residual),
                                         .residual_stride = args.residual_stride,
                                         .weight = args.weight,
                                         .bias = args.bias,
                                         .float_weights = args.weight_dtype == DType::float32,
                                         .y = static_cast<T*>(args.y),
                                         .summed = static_cast<R*>(args.summed),
                                         .mean = args.mean,
                                         .rstd = args.rstd,
                                         .rows = args.rows,
                                         .width = int(args.width),
                                         .team = partition.team,
                                         .eps = args.eps,
                                         .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    if (in_registers)
      FASTLM_LAUNCH((layernorm_residual_forward_kernel<T, R>), unsigned(partition.blocks), partition.threads,
                    partition.shared_bytes(2), stream, kernel_args);
    else
      FASTLM_LAUNCH((layernorm_residual_forward_generic_kernel<T, R>), unsigned(partition.blocks), partition.threads,
                    partition.shared_bytes(2), stream, kernel_args);
  });
}

int64_t layernorm_residual_max_partials() { return max_partials(); }

void layernorm_residual_backward(const layernorm_residual_backward_args& args, stream_t stream) {
  if (args.rows == 0) return;
  const bool in_registers = fits_in_registers(args.width) && aligned(args.dy, args.dy_stride) &&
                            aligned(args.dsummed, args.dsummed_stride) && aligned(args.summed, args.summed_stride) &&
                            aligned(args.weight, 0) && aligned(args.dx, 0) && aligned(args.dresidual, 0) &&
                            aligned(args.partials, 0);
  const row_partition partition("layernorm_residual", args.rows, args.width, in_registers);
  float* dbias_partials =
      args.dweight ? args.partials + int64_t(partition.partials) * partition.padded_width : args.partials;
  dispatch_types(args.x_dtype, args.residual_dtype, [&]<class T, class R>() {
    const backward_args<T, R> kernel_args{.dy = static_cast<const T*>(args.dy),
                                          .dy_stride = args.dy_stride,
                                          .dsummed = static_cast<const R*>(args.dsummed),
                                          .dsummed_stride = args.dsummed_stride,
                                          .summed = static_cast<const R*>(args.summed),
                                          .summed_stride = args.summed_stride,
                                          .weight = args.weight,
                                          .float_weights = args.weight_dtype == DType::float32,
                                          .mean = args.mean,
                                          .rstd = args.rstd,
                                          .dx = static_cast<T*>(args.dx),
                                          .dresidual = static_cast<R*>(args.dresidual),
                                          .dweight = args.dweight ? args.partials : nullptr,
                                          .dbias = args.dbias ? dbias_partials : nullptr,
                                          .rows = args.rows,
                                          .width = int(args.width),
                                          .padded_width = partition.padded_width,
                                          .team = partition.team,
                                          .rows_per_team = partition.rows_per_team,
                                          .drop = make_dropout(args.seed ? args.dropout_p : 0.0, args.seed)};
    const size_t sums =
        partition.threads > partition.team ? size_t(partition.team) * COLUMNS_PER_THREAD * sizeof(float) : 0;
    if (in_registers)
      FASTLM_LAUNCH((layernorm_residual_backward_kernel<T, R>), unsigned(partition.partials), partition.threads,
                    std::max(partition.shared_bytes(2) + slot_bytes<T, R>(partition.threads), sums), stream,
                    kernel_args);
    else
      FASTLM_LAUNCH((layernorm_residual_backward_generic_kernel<T, R>), unsigned(partition.partials), partition.threads,
                    partition.shared_bytes(2), stream, kernel_args);
  });
  reduce_partials(args.partials, args.weight_dtype, args.dweight, args.dbias, partition, args.width, stream);
}

}  // namespace fastlm::cuda
