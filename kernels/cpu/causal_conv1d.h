/* Depthwise causal convolution over time in fp32 on the CPU, SiLU fused, state in and out.
 *
 *   e = [initial state, x], width - 1 + length rows (zeros where there is no state)
 *   pre_t = bias + sum_k weight[:, k] e_{t + k},  out_t = pre_t or silu(pre_t),  final state = last width - 1 of e
 *
 * Every field is eight bytes, mirrored field by field in bindings.py. Strides count floats; the channel axis has
 * stride 1. Optional arrays are NULL.
 */
#ifndef SSM_CAUSAL_CONV1D_H
#define SSM_CAUSAL_CONV1D_H

#include <stdint.h>

typedef struct {
  int64_t batch, length, channels, width;
  int64_t sequences;      /* batch, or the packed sequences when borders is given (batch is 1 then) */
  const int64_t *borders; /* (sequences + 1,) or NULL */
  int64_t reverse, silu;
  int64_t threads;
  const float *x, *dout; /* (batch, length, channels) */
  int64_t x_batch, x_time, dout_batch, dout_time;
  const float *weight, *bias; /* (channels, width), (channels,) contiguous */
  const float *initial;       /* (sequences, channels, width - 1) contiguous, so all below */
  float *out;                 /* (batch, length, channels) */
  float *final;               /* (sequences, channels, width - 1) */
  const float *dfinal;        /* (sequences, channels, width - 1) */
  float *dx;                  /* (batch, length, channels) */
  float *dweight, *dbias;     /* (channels, width), (channels,) */
  float *dinitial;            /* (sequences, channels, width - 1) or NULL */
} ConvArgs;

/* Both return 0, or -1 where memory for scratch could not be had. */
int ssm_causal_conv1d_fwd(const ConvArgs *args);
int ssm_causal_conv1d_bwd(const ConvArgs *args);

#endif
