/* Selective scan (S6, Gu & Dao 2023, arXiv 2312.00752, algorithm 2) in fp32 on the CPU.
 *
 *   dt_t = softplus(delta_t + delta_bias)              (batch, length, channels)
 *   h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t          (batch, channels, states)
 *   y_t  = <C_t, h_t> + D u_t,  out_t = y_t silu(z_t)
 *
 * Every field is eight bytes, mirrored field by field in bindings.py. Strides count floats; the channel axis (the
 * state axis of B and C) has stride 1. Optional arrays are NULL.
 */
#ifndef SSM_SELECTIVE_SCAN_H
#define SSM_SELECTIVE_SCAN_H

#include <stdint.h>

typedef struct {
  int64_t batch, length, channels, states, groups;
  int64_t sequences;         /* batch, or the packed sequences when borders is given (batch is 1 then) */
  const int64_t *borders;    /* (sequences + 1,) or NULL */
  int64_t reverse, softplus;
  int64_t tile;              /* steps between two kept states */
  int64_t threads;
  const float *u, *delta, *z, *dout;                         /* (batch, length, channels) */
  int64_t u_batch, u_time, delta_batch, delta_time, z_batch, z_time, dout_batch, dout_time;
  const float *B, *C;                                        /* (batch, length, groups, states) */
  int64_t B_batch, B_time, B_group, C_batch, C_time, C_group;
  const float *A, *D, *delta_bias;                           /* (channels, states), (channels,) contiguous */
  const float *initial;                                      /* (sequences, channels, states) contiguous */
  float *out;                                                /* (batch, length, channels) contiguous, so all below */
  float *final;                                              /* (sequences, channels, states) */
  float *kept;                                               /* (tiles, states, channels): the state before a tile */
  const float *dfinal;                                       /* (sequences, channels, states) or NULL */
  float *du, *ddelta, *dz;                                   /* (batch, length, channels) */
  float *dA, *dD, *ddelta_bias;                              /* (channels, states), (channels,) */
  float *dB, *dC;                                            /* (batch, length, groups, states) */
  float *dinitial;                                           /* (sequences, channels, states) or NULL */
} ScanArgs;

/* Both return 0, or -1 where memory for scratch could not be had. */
int ssm_selective_scan_fwd(const ScanArgs *args);
int ssm_selective_scan_bwd(const ScanArgs *args);

#endif
