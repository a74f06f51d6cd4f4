/* Selective scan on the CPU: forward and backward. See selective_scan.h for the equations and the arguments.
 *
 * A lane holds a channel. Time runs in tiles: all blocks of channels of a task go through one tile of steps before
 * the next tile, so rows of u, delta, z and out are met again while their pages are known. Forward keeps the state
 * before each tile; backward rebuilds the states of one tile from it, a slice of states at a time so that what is
 * rebuilt stays in L1.
 *
 * Work is cut in tasks: (slot of whole segments) x (group of B and C) x (part of the group's channel blocks). A
 * segment is a sequence, or a stretch of one when there are fewer sequences and blocks than threads: then a first
 * pass finds what each stretch adds to the state (its decay is exp(A sum dt)) and a short serial pass joins them.
 * Sums over channels (dB, dC) go to one buffer a part and sums over time (dA, dD, ddelta_bias) to one a slot,
 * joined in fixed order: the result depends on the number of threads, never on their timing.
 */
#include "selective_scan.h"

#include "parallel.h"
#include "vec.h"

#define LOG2E 1.4426950408889634f
#define MOST_SLICE 4       /* states rebuilt together in backward */
#define MOST_TILE_SLICE 128 /* tile * slice at most */

typedef struct {
  int64_t sequence, batch;
  int64_t row;   /* row of its first step in scan order */
  int64_t steps;
  int64_t tile;  /* index of its first tile */
  int first, last; /* of its sequence */
} Segment;

typedef struct {
  const ScanArgs *a;
  int64_t direction;      /* +1 or -1: row step from one scan step to the next */
  int slice;              /* states rebuilt together in backward */
  int64_t padded;         /* states rounded up to a multiple of slice */
  int64_t group_channels; /* channels a group of B and C */
  int64_t group_blocks;   /* channel blocks a group */
  int64_t blocks;         /* all channel blocks */
  int64_t segments, slots, parts;
  Segment *segment;
  int64_t *slot_start;    /* (slots + 1,) segments of each slot */
  vf *ends, *dt_sums;     /* (segments, blocks, states), (segments, blocks): of split sequences; else NULL */
  vf *part_dA, *part_dD, *part_bias; /* (slots, blocks, states), (slots, blocks), (slots, blocks) */
  float *part_dB, *part_dC;          /* (parts, batch, length, groups, states), or NULL where parts == 1 */
  char *scratch;
  int64_t scratch_size;   /* bytes a thread */
} Plan;

typedef struct {
  int64_t channel; /* the first */
  int width;       /* channels, at most VL */
  int64_t group;
} Block;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void *take(int64_t bytes) { return aligned_alloc(64, (size_t)(ceil_div(max64(bytes, 1), 64) * 64)); }

static Block block_at(const Plan *p, int64_t index) {
  int64_t group = index / p->group_blocks, inside = index % p->group_blocks * VL;
  return (Block){group * p->group_channels + inside, (int)min64(VL, p->group_channels - inside), group};
}

/* rows[i] for i < states, each a vector over the block's channels, from a (channels, states) matrix, times `scale`. */
static void load_states(const float *m, const Plan *p, Block b, float scale, vf *rows) {
  int64_t n = p->a->states;
  memset(rows, 0, (size_t)p->padded * sizeof(vf));
  if (!m) return;
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < b.width; j++) rows[i][j] = m[(b.channel + j) * n + i] * scale;
}

static void store_states(float *m, const Plan *p, Block b, const vf *rows) {
  int64_t n = p->a->states;
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < b.width; j++) m[(b.channel + j) * n + i] = rows[i][j];
}

/* ---- planning ---------------------------------------------------------------------------------------------- */

static void free_plan(Plan *p) {
  free(p->segment);
  free(p->slot_start);
  free(p->ends);
  free(p->dt_sums);
  free(p->part_dA);
  free(p->part_dD);
  free(p->part_bias);
  free(p->part_dB);
  free(p->part_dC);
  free(p->scratch);
}

/* Tasks worth having: a few a thread so that a thread that starts late does not hold up the rest. */
static int64_t wanted_tasks(const ScanArgs *a, int64_t rows, int64_t blocks) {
  int64_t work = rows * blocks * a->states; /* vector steps */
  if (a->threads <= 1 || work < 2048) return 1;
  return work < 200000 ? a->threads : 4 * a->threads;
}

static int make_plan(Plan *p, const ScanArgs *a) {
  memset(p, 0, sizeof *p);
  p->a = a;
  p->direction = a->reverse ? -1 : 1;
  p->slice = a->states >= 3 ? 4 : a->states == 2 ? 2 : 1;
  while (p->slice > 1 && p->slice * a->tile > MOST_TILE_SLICE) p->slice /= 2;
  p->padded = ceil_div(a->states, p->slice) * p->slice;
  p->group_channels = a->channels / a->groups;
  p->group_blocks = ceil_div(p->group_channels, VL);
  p->blocks = p->group_blocks * a->groups;

  int64_t rows = a->borders ? a->length : a->batch * a->length;
  int64_t units = a->sequences * p->blocks, longest = a->length;
  int64_t wanted = wanted_tasks(a, rows, p->blocks);
  int64_t split = 1; /* segments a sequence of the full length would get */
  if (wanted > 1 && a->threads >= 2 * units && longest >= 8 * a->tile)
    split = min64(a->threads / max64(units, 1), longest / (4 * a->tile));
  int64_t stretch = split > 1 ? ceil_div(ceil_div(longest, split), a->tile) * a->tile : max64(longest, 1);

  int64_t most = a->sequences + rows / stretch + 1;
  p->segment = take(most * (int64_t)sizeof(Segment));
  p->slot_start = take((most + 1) * (int64_t)sizeof(int64_t));
  if (!p->segment || !p->slot_start) return -1;
  int64_t tile = 0;
  for (int64_t s = 0; s < a->sequences; s++) {
    int64_t start = a->borders ? a->borders[s] : 0;
    int64_t steps = a->borders ? a->borders[s + 1] - start : a->length;
    int64_t done = 0;
    do {
      Segment *g = &p->segment[p->segments++];
      g->sequence = s;
      g->batch = a->borders ? 0 : s;
      g->steps = min64(stretch, steps - done);
      g->row = a->reverse ? start + steps - 1 - done : start + done;
      g->tile = tile;
      g->first = done == 0;
      done += g->steps;
      g->last = done >= steps;
      tile += ceil_div(g->steps, a->tile);
    } while (done < steps);
  }

  int64_t slots = min64(wanted, p->segments);
  /* More parts than threads need only where a part keeps enough blocks to make its buffer of sums worth it. */
  const int64_t apart = max64(slots * a->groups, 1);
  p->parts = min64(ceil_div(wanted, apart), max64(ceil_div(min64(wanted, a->threads), apart), p->group_blocks / 8));
  p->parts = min64(p->parts, p->group_blocks);
  /* Slots of about equal steps: a slot ends where the running sum reaches its share. */
  int64_t seen = 0, at = 0;
  p->slot_start[0] = 0;
  for (int64_t i = 0; i < p->segments; i++) {
    seen += p->segment[i].steps;
    if (i + 1 == p->segments || (seen * slots >= (at + 1) * max64(rows, 1) && at + 1 < slots))
      p->slot_start[++at] = i + 1;
  }
  p->slots = at;

  if (split > 1) {
    p->ends = take(p->segments * p->blocks * p->padded * (int64_t)sizeof(vf));
    p->dt_sums = take(p->segments * p->blocks * (int64_t)sizeof(vf));
    if (!p->ends || !p->dt_sums) return -1;
  }
  return 0;
}

static int take_scratch(Plan *p, int64_t vectors) {
  p->scratch_size = vectors * (int64_t)sizeof(vf);
  int64_t tasks = p->slots * p->parts * p->a->groups;
  p->scratch = take(p->scratch_size * max64(1, min64(p->a->threads, tasks)));
  return p->scratch ? 0 : -1;
}

/* The blocks [first, last) and segments [from, to) of a task. */
typedef struct {
  int64_t slot, part, group, first, last, from, to;
} Task;

static Task task_at(const Plan *p, int64_t index) {
  Task t;
  t.part = index % p->parts;
  t.group = index / p->parts % p->a->groups;
  t.slot = index / p->parts / p->a->groups;
  t.first = t.group * p->group_blocks + t.part * p->group_blocks / p->parts;
  t.last = t.group * p->group_blocks + (t.part + 1) * p->group_blocks / p->parts;
  t.from = p->slot_start[t.slot];
  t.to = p->slot_start[t.slot + 1];
  return t;
}

/* ---- forward ----------------------------------------------------------------------------------------------- */

/* At most a tile of steps of one block. With `emit` the outputs are written; without, only the state moves and dt is
 * summed. What does not depend on the state comes first, in a loop of its own: its long chains (exponentials,
 * divisions) overlap there and would hold up the recurrence. work: (3 * tile,). */
INLINE void forward_tile(const ScanArgs *a, int full, int emit, Block b, int64_t batch, int64_t row, int64_t step,
                         int64_t steps, const vf *A2, vf *h, vf *work, vf *dt_sum) {
  const int w = b.width;
  const int64_t n_states = a->states;
  const float *u = a->u + batch * a->u_batch + row * a->u_time + b.channel;
  const float *delta = a->delta + batch * a->delta_batch + row * a->delta_time + b.channel;
  const float *z = a->z ? a->z + batch * a->z_batch + row * a->z_time + b.channel : NULL;
  const float *B = a->B + batch * a->B_batch + row * a->B_time + b.group * a->B_group;
  const float *C = a->C + batch * a->C_batch + row * a->C_time + b.group * a->C_group;
  float *out = emit ? a->out + (batch * a->length + row) * a->channels + b.channel : NULL;
  const vf bias = a->delta_bias ? v_load(a->delta_bias + b.channel, full, w) : (vf){0};
  const vf D = a->D ? v_load(a->D + b.channel, full, w) : (vf){0};
  vf *dts = work, *dtus = work + a->tile, *skips = work + 2 * a->tile;
  vf sum = {0};
  for (int64_t t = 0; t < steps; t++) {
    vf ut = v_load(u + t * step * a->u_time, full, w), dt = v_load(delta + t * step * a->delta_time, full, w) + bias;
    if (a->softplus) dt = v_softplus(dt);
    dts[t] = dt;
    dtus[t] = dt * ut;
    skips[t] = D * ut;
    sum += dt;
  }
  *dt_sum += sum;
  for (int64_t t = 0; t < steps; t++) {
    vf dt = dts[t], dtu = dtus[t], y = skips[t];
    for (int64_t n = 0; n < n_states; n++) {
      h[n] = v_exp2(dt * A2[n]) * h[n] + dtu * B[n];
      if (emit) y += h[n] * C[n];
    }
    skips[t] = y;
    /* The next block's rows lie beside this one's, a row's stride apart: too far for the hardware to foresee. */
    __builtin_prefetch(u + t * step * a->u_time + VL);
    __builtin_prefetch(delta + t * step * a->delta_time + VL);
    if (z) __builtin_prefetch(z + t * step * a->z_time + VL);
    if (emit) __builtin_prefetch(out + t * step * a->channels + VL, 1);
    B += step * a->B_time;
    C += step * a->C_time;
  }
  if (emit)
    for (int64_t t = 0; t < steps; t++) {
      vf y = skips[t];
      if (z) {
        vf zt = v_load(z + t * step * a->z_time, full, w);
        y *= zt * v_sigmoid(zt);
      }
      v_store(out + t * step * a->channels, y, full, w);
    }
}

static void forward_steps(const Plan *p, int emit, Block b, const Segment *g, int64_t at, int64_t steps, const vf *A2,
                          vf *h, vf *work, vf *dt_sum) {
  int64_t row = g->row + at * p->direction;
  if (b.width == VL && emit)
    forward_tile(p->a, 1, 1, b, g->batch, row, p->direction, steps, A2, h, work, dt_sum);
  else if (b.width == VL)
    forward_tile(p->a, 1, 0, b, g->batch, row, p->direction, steps, A2, h, work, dt_sum);
  else if (emit)
    forward_tile(p->a, 0, 1, b, g->batch, row, p->direction, steps, A2, h, work, dt_sum);
  else
    forward_tile(p->a, 0, 0, b, g->batch, row, p->direction, steps, A2, h, work, dt_sum);
}

/* First pass over split sequences: the state each segment ends in when it starts from 0, and its sum of dt. */
static void forward_ends(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const int64_t N = p->padded;
  Segment g = p->segment[index / p->blocks];
  if (g.last) return;
  Block b = block_at(p, index % p->blocks);
  vf *A2 = (vf *)(p->scratch + thread * p->scratch_size);
  load_states(p->a->A, p, b, LOG2E, A2);
  vf *h = p->ends + index * N;
  memset(h, 0, (size_t)N * sizeof(vf));
  p->dt_sums[index] = (vf){0};
  for (int64_t at = 0; at < g.steps; at += p->a->tile)
    forward_steps(p, 0, b, &g, at, min64(p->a->tile, g.steps - at), A2, h, A2 + N, &p->dt_sums[index]);
}

/* Turns `ends` into the state each segment starts from (forward in time). */
static void join_ends(const Plan *p, vf *A2, vf *h) {
  const int64_t N = p->padded;
  for (int64_t k = 0; k < p->blocks; k++) {
    Block b = block_at(p, k);
    load_states(p->a->A, p, b, LOG2E, A2);
    for (int64_t i = 0; i < p->segments; i++) {
      Segment g = p->segment[i];
      vf *end = p->ends + (i * p->blocks + k) * N, dt = p->dt_sums[i * p->blocks + k];
      if (g.first) {
        const float *m = p->a->initial;
        load_states(m ? m + g.sequence * p->a->channels * p->a->states : NULL, p, b, 1.0f, h);
      }
      for (int64_t n = 0; n < N; n++) {
        vf start = h[n];
        if (!g.last) h[n] = end[n] + v_exp2(dt * A2[n]) * start;
        end[n] = start;
      }
    }
  }
}

static void forward_task(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const ScanArgs *a = p->a;
  const int64_t N = p->padded;
  Task t = task_at(p, index);
  vf *A2 = (vf *)(p->scratch + thread * p->scratch_size);
  vf *h = A2 + (t.last - t.first) * N;
  vf *work = h + (t.last - t.first) * N, dt_sum = {0};
  for (int64_t k = t.first; k < t.last; k++) load_states(a->A, p, block_at(p, k), LOG2E, A2 + (k - t.first) * N);
  for (int64_t i = t.from; i < t.to; i++) {
    const Segment *g = &p->segment[i];
    const int64_t states = g->sequence * a->channels * a->states;
    for (int64_t k = t.first; k < t.last; k++) {
      if (p->ends)
        memcpy(h + (k - t.first) * N, p->ends + (i * p->blocks + k) * N, (size_t)N * sizeof(vf));
      else
        load_states(a->initial ? a->initial + states : NULL, p, block_at(p, k), 1.0f, h + (k - t.first) * N);
    }
    for (int64_t at = 0, tile = g->tile; at < g->steps; at += a->tile, tile++)
      for (int64_t k = t.first; k < t.last; k++) {
        Block b = block_at(p, k);
        vf *hk = h + (k - t.first) * N;
        if (a->kept) {
          float *kept = a->kept + tile * a->states * a->channels + b.channel;
          for (int64_t n = 0; n < a->states; n++) v_store(kept + n * a->channels, hk[n], b.width == VL, b.width);
        }
        forward_steps(p, 1, b, g, at, min64(a->tile, g->steps - at), A2 + (k - t.first) * N, hk, work, &dt_sum);
      }
    if (g->last)
      for (int64_t k = t.first; k < t.last; k++)
        store_states(a->final + states, p, block_at(p, k), h + (k - t.first) * N);
  }
}

int ssm_selective_scan_fwd(const ScanArgs *a) {
  Plan p;
  int failed = make_plan(&p, a) || take_scratch(&p, 2 * p.group_blocks * p.padded + 3 * a->tile);
  if (!failed) {
    ssm_large_pages(a->out, a->batch * a->length * a->channels * 4);
    const Segment *last = p.segments ? &p.segment[p.segments - 1] : NULL;
    if (last) ssm_large_pages(a->kept, (last->tile + ceil_div(last->steps, a->tile)) * a->states * a->channels * 4);
    if (p.ends) {
      ssm_parallel(forward_ends, &p, p.segments * p.blocks, (int)min64(a->threads, p.slots * p.parts * a->groups));
      join_ends(&p, (vf *)p.scratch, (vf *)p.scratch + p.padded);
    }
    ssm_parallel(forward_task, &p, p.slots * p.parts * a->groups, (int)a->threads);
  }
  free_plan(&p);
  return failed ? -1 : 0;
}

/* ---- backward ---------------------------------------------------------------------------------------------- */

/* What backward holds of one block over one tile, and the sums over channels of one tile. */
typedef struct {
  vf *dt, *dtu, *dy, *y, *ddt, *ddtu; /* (tile,) */
  vf *h, *decay;                      /* (tile, slice) */
  vf *sum_B, *sum_C;                  /* (tile, padded): sums over blocks, a lane each still to be added */
  float *B, *C;                       /* (tile, padded): the tile's rows of B and C, padded with 0 */
} Workspace;

/* One slice of SLICE states over one tile: rebuild the states forward in time, then walk back.
 * A: (SLICE,) as given; g, dA: (SLICE,) the adjoint of the state entering from the later tile, and the running dA. */
INLINE void backward_slice(const int SLICE, const Workspace *w, int64_t steps, int64_t padded, int64_t n0,
                           const vf *A, const vf *start, vf *g_carry, vf *dA_sum) {
  vf h[MOST_SLICE], g[MOST_SLICE], dA[MOST_SLICE], A1[MOST_SLICE], A2[MOST_SLICE];
  for (int i = 0; i < SLICE; i++) {
    h[i] = start[i];
    A1[i] = A[i];
    A2[i] = A[i] * LOG2E;
  }
  const float *B = w->B + n0, *C = w->C + n0;
  for (int64_t t = 0; t < steps; t++) {
    vf dt = w->dt[t], dtu = w->dtu[t], y = w->y[t];
    for (int i = 0; i < SLICE; i++) {
      vf decay = v_exp2(dt * A2[i]);
      h[i] = decay * h[i] + dtu * B[t * padded + i];
      y += h[i] * C[t * padded + i];
      w->decay[t * SLICE + i] = decay;
      w->h[t * SLICE + i] = h[i];
    }
    w->y[t] = y;
  }
  for (int i = 0; i < SLICE; i++) {
    g[i] = g_carry[i];
    dA[i] = (vf){0};
  }
  for (int64_t t = steps - 1; t >= 0; t--) {
    vf dt = w->dt[t], dtu = w->dtu[t], dy = w->dy[t], ddt = w->ddt[t], ddtu = w->ddtu[t];
    for (int i = 0; i < SLICE; i++) {
      const int64_t at = t * padded + i;
      vf before = t > 0 ? w->h[(t - 1) * SLICE + i] : start[i];
      vf dh = g[i] + dy * C[at];
      w->sum_C[at + n0] += dy * h[i];
      w->sum_B[at + n0] += dh * dtu;
      ddtu += dh * B[at];
      g[i] = dh * w->decay[t * SLICE + i];
      vf dx = g[i] * before; /* gradient of dt A */
      ddt += dx * A1[i];
      dA[i] += dx * dt;
      h[i] = before;
    }
    w->ddt[t] = ddt;
    w->ddtu[t] = ddtu;
  }
  for (int i = 0; i < SLICE; i++) {
    g_carry[i] = g[i];
    dA_sum[i] += dA[i];
  }
}

/* One block over one tile. A, start, g, dA: (padded,). */
INLINE void backward_tile(const Plan *p, int full, Block b, int64_t batch, int64_t row, int64_t steps,
                          const Workspace *w, const vf *A, const vf *start, vf *g, vf *dA, vf *dD, vf *dbias) {
  const ScanArgs *a = p->a;
  const int64_t d = p->direction;
  const int width = b.width;
  const float *u = a->u + batch * a->u_batch + row * a->u_time + b.channel;
  const float *delta = a->delta + batch * a->delta_batch + row * a->delta_time + b.channel;
  const float *z = a->z ? a->z + batch * a->z_batch + row * a->z_time + b.channel : NULL;
  const float *dout = a->dout + batch * a->dout_batch + row * a->dout_time + b.channel;
  const int64_t at = (batch * a->length + row) * a->channels + b.channel;
  const vf bias = a->delta_bias ? v_load(a->delta_bias + b.channel, full, width) : (vf){0};
  const vf D = a->D ? v_load(a->D + b.channel, full, width) : (vf){0};
  for (int64_t t = 0; t < steps; t++) {
    vf ut = v_load(u + t * d * a->u_time, full, width);
    vf dt = v_load(delta + t * d * a->delta_time, full, width) + bias;
    if (a->softplus) dt = v_softplus(dt);
    vf dy = v_load(dout + t * d * a->dout_time, full, width);
    if (z) {
      vf zt = v_load(z + t * d * a->z_time, full, width);
      dy *= zt * v_sigmoid(zt);
    }
    w->dt[t] = dt;
    w->dtu[t] = dt * ut;
    w->dy[t] = dy;
    w->y[t] = D * ut;
    w->ddt[t] = w->ddtu[t] = (vf){0};
  }
  for (int64_t n = 0; n < p->padded; n += p->slice) {
    if (p->slice == 4)
      backward_slice(4, w, steps, p->padded, n, A + n, start + n, g + n, dA + n);
    else if (p->slice == 2)
      backward_slice(2, w, steps, p->padded, n, A + n, start + n, g + n, dA + n);
    else
      backward_slice(1, w, steps, p->padded, n, A + n, start + n, g + n, dA + n);
  }
  vf sum_D = {0}, sum_bias = {0};
  for (int64_t t = 0; t < steps; t++) {
    vf ut = v_load(u + t * d * a->u_time, full, width), dy = w->dy[t];
    vf ddelta = w->ddt[t] + w->ddtu[t] * ut;
    if (a->softplus) ddelta *= v_sigmoid(v_load(delta + t * d * a->delta_time, full, width) + bias);
    if (z) {
      vf zt = v_load(z + t * d * a->z_time, full, width), s = v_sigmoid(zt);
      vf o = v_load(dout + t * d * a->dout_time, full, width);
      v_store(a->dz + at + t * d * a->channels, o * w->y[t] * (s + zt * (s * (1.0f - s))), full, width);
    }
    __builtin_prefetch(u + t * d * a->u_time + VL);
    __builtin_prefetch(delta + t * d * a->delta_time + VL);
    if (z) __builtin_prefetch(z + t * d * a->z_time + VL);
    __builtin_prefetch(dout + t * d * a->dout_time + VL);
    v_store(a->du + at + t * d * a->channels, w->ddtu[t] * w->dt[t] + D * dy, full, width);
    v_store(a->ddelta + at + t * d * a->channels, ddelta, full, width);
    sum_D += dy * ut;
    sum_bias += ddelta;
  }
  *dD += sum_D;
  *dbias += sum_bias;
}

/* First pass of backward over split sequences: the adjoint each segment hands to the one before it when nothing
 * enters from later, and its sum of dt. */
INLINE void adjoint_steps(const Plan *p, int full, Block b, const Segment *s, const vf *A2, vf *g, vf *dt_sum) {
  const ScanArgs *a = p->a;
  const int w = b.width;
  const vf bias = a->delta_bias ? v_load(a->delta_bias + b.channel, full, w) : (vf){0};
  for (int64_t t = s->steps - 1; t >= 0; t--) {
    int64_t row = s->row + t * p->direction;
    vf dt = v_load(a->delta + s->batch * a->delta_batch + row * a->delta_time + b.channel, full, w) + bias;
    if (a->softplus) dt = v_softplus(dt);
    vf dy = v_load(a->dout + s->batch * a->dout_batch + row * a->dout_time + b.channel, full, w);
    if (a->z) {
      vf zt = v_load(a->z + s->batch * a->z_batch + row * a->z_time + b.channel, full, w);
      dy *= zt * v_sigmoid(zt);
    }
    const float *C = a->C + s->batch * a->C_batch + row * a->C_time + b.group * a->C_group;
    for (int64_t n = 0; n < a->states; n++) g[n] = (g[n] + dy * C[n]) * v_exp2(dt * A2[n]);
    *dt_sum += dt;
  }
}

static void adjoint_ends(void *context, int64_t index, int thread) {
  const Plan *p = context;
  Segment s = p->segment[index / p->blocks];
  if (s.first) return;
  Block b = block_at(p, index % p->blocks);
  vf *A2 = (vf *)(p->scratch + thread * p->scratch_size);
  load_states(p->a->A, p, b, LOG2E, A2);
  vf *g = p->ends + index * p->padded;
  memset(g, 0, (size_t)p->padded * sizeof(vf));
  p->dt_sums[index] = (vf){0};
  if (b.width == VL)
    adjoint_steps(p, 1, b, &s, A2, g, &p->dt_sums[index]);
  else
    adjoint_steps(p, 0, b, &s, A2, g, &p->dt_sums[index]);
}

/* Turns `ends` into the adjoint that enters each segment from the later one (backward in time). */
static void join_adjoints(const Plan *p, vf *A2, vf *g) {
  const int64_t N = p->padded;
  for (int64_t k = 0; k < p->blocks; k++) {
    Block b = block_at(p, k);
    load_states(p->a->A, p, b, LOG2E, A2);
    for (int64_t i = p->segments - 1; i >= 0; i--) {
      Segment s = p->segment[i];
      vf *end = p->ends + (i * p->blocks + k) * N, dt = p->dt_sums[i * p->blocks + k];
      if (s.last) {
        const float *m = p->a->dfinal;
        load_states(m ? m + s.sequence * p->a->channels * p->a->states : NULL, p, b, 1.0f, g);
      }
      for (int64_t n = 0; n < N; n++) {
        vf enters = g[n];
        if (!s.first) g[n] = end[n] + v_exp2(dt * A2[n]) * enters;
        end[n] = enters;
      }
    }
  }
}

static void copy_rows(const Plan *p, const float *from, int64_t time, int64_t steps, float *to) {
  memset(to, 0, (size_t)(steps * p->padded) * sizeof(float));
  for (int64_t t = 0; t < steps; t++)
    memcpy(to + t * p->padded, from + t * p->direction * time, (size_t)p->a->states * sizeof(float));
}

static void backward_task(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const ScanArgs *a = p->a;
  const int64_t N = p->padded, T = a->tile;
  Task t = task_at(p, index);
  const int64_t blocks = t.last - t.first;
  vf *at_scratch = (vf *)(p->scratch + thread * p->scratch_size);
  vf *A = at_scratch, *g = A + blocks * N, *start = g + blocks * N;
  Workspace w;
  w.dt = start + N;
  w.dtu = w.dt + T;
  w.dy = w.dtu + T;
  w.y = w.dy + T;
  w.ddt = w.y + T;
  w.ddtu = w.ddt + T;
  w.h = w.ddtu + T;
  w.decay = w.h + T * p->slice;
  w.sum_B = w.decay + T * p->slice;
  w.sum_C = w.sum_B + T * N;
  w.B = (float *)(w.sum_C + T * N);
  w.C = w.B + T * N;
  float *sums = w.C + T * N; /* (T * N,) */
  vf *dA = p->part_dA + (t.slot * p->blocks + t.first) * N;
  vf *dD = p->part_dD + t.slot * p->blocks + t.first, *dbias = p->part_bias + t.slot * p->blocks + t.first;
  memset(dA, 0, (size_t)(blocks * N) * sizeof(vf));
  memset(dD, 0, (size_t)blocks * sizeof(vf));
  memset(dbias, 0, (size_t)blocks * sizeof(vf));
  const int64_t part = t.part * a->batch * a->length * a->groups * a->states;
  float *dB = p->part_dB ? p->part_dB + part : a->dB, *dC = p->part_dC ? p->part_dC + part : a->dC;

  for (int64_t k = 0; k < blocks; k++) load_states(a->A, p, block_at(p, t.first + k), 1.0f, A + k * N);
  for (int64_t i = t.from; i < t.to; i++) {
    const Segment *s = &p->segment[i];
    const int64_t states = s->sequence * a->channels * a->states;
    for (int64_t k = 0; k < blocks; k++) {
      if (p->ends)
        memcpy(g + k * N, p->ends + (i * p->blocks + t.first + k) * N, (size_t)N * sizeof(vf));
      else
        load_states(a->dfinal ? a->dfinal + states : NULL, p, block_at(p, t.first + k), 1.0f, g + k * N);
    }
    for (int64_t tile = ceil_div(s->steps, T) - 1; tile >= 0; tile--) {
      const int64_t steps = min64(T, s->steps - tile * T), row = s->row + tile * T * p->direction;
      copy_rows(p, a->B + s->batch * a->B_batch + row * a->B_time + t.group * a->B_group, a->B_time, steps, w.B);
      copy_rows(p, a->C + s->batch * a->C_batch + row * a->C_time + t.group * a->C_group, a->C_time, steps, w.C);
      const int64_t count = ceil_div(steps * N, VL) * VL;
      memset(w.sum_B, 0, (size_t)count * sizeof(vf));
      memset(w.sum_C, 0, (size_t)count * sizeof(vf));
      for (int64_t k = 0; k < blocks; k++) {
        Block b = block_at(p, t.first + k);
        const float *kept = a->kept + (s->tile + tile) * a->states * a->channels + b.channel;
        memset(start, 0, (size_t)N * sizeof(vf));
        for (int64_t n = 0; n < a->states; n++) start[n] = v_load(kept + n * a->channels, b.width == VL, b.width);
        if (b.width == VL)
          backward_tile(p, 1, b, s->batch, row, steps, &w, A + k * N, start, g + k * N, dA + k * N, dD + k, dbias + k);
        else
          backward_tile(p, 0, b, s->batch, row, steps, &w, A + k * N, start, g + k * N, dA + k * N, dD + k, dbias + k);
      }
      for (int which = 0; which < 2; which++) {
        v_sum_lanes(which ? w.sum_C : w.sum_B, sums, count);
        float *to = which ? dC : dB;
        for (int64_t q = 0; q < steps; q++) {
          int64_t r = (s->batch * a->length + row + q * p->direction) * a->groups + t.group;
          memcpy(to + r * a->states, sums + q * N, (size_t)a->states * sizeof(float));
        }
      }
    }
    if (s->first && a->dinitial)
      for (int64_t k = 0; k < blocks; k++) store_states(a->dinitial + states, p, block_at(p, t.first + k), g + k * N);
  }
}

/* Sums what the slots found for one block. */
static void join_slots(void *context, int64_t k, int thread) {
  const Plan *p = context;
  const ScanArgs *a = p->a;
  const int64_t N = p->padded;
  Block b = block_at(p, k);
  (void)thread;
  for (int64_t s = 1; s < p->slots; s++) {
    for (int64_t n = 0; n < N; n++) p->part_dA[k * N + n] += p->part_dA[(s * p->blocks + k) * N + n];
    p->part_dD[k] += p->part_dD[s * p->blocks + k];
    p->part_bias[k] += p->part_bias[s * p->blocks + k];
  }
  store_states(a->dA, p, b, p->part_dA + k * N);
  if (a->dD) v_store(a->dD + b.channel, p->part_dD[k], 0, b.width);
  if (a->ddelta_bias) v_store(a->ddelta_bias + b.channel, p->part_bias[k], 0, b.width);
}

#define JOIN_ROWS 4096

/* Sums the parts' dB and dC over one stretch of JOIN_ROWS floats. */
static void join_parts(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const ScanArgs *a = p->a;
  const int64_t total = a->batch * a->length * a->groups * a->states;
  const int64_t from = index * JOIN_ROWS, to = min64(total, from + JOIN_ROWS);
  (void)thread;
  memcpy(a->dB + from, p->part_dB + from, (size_t)(to - from) * sizeof(float));
  memcpy(a->dC + from, p->part_dC + from, (size_t)(to - from) * sizeof(float));
  for (int64_t s = 1; s < p->parts; s++)
    for (int64_t i = from; i < to; i++) {
      a->dB[i] += p->part_dB[s * total + i];
      a->dC[i] += p->part_dC[s * total + i];
    }
}

int ssm_selective_scan_bwd(const ScanArgs *a) {
  Plan p;
  int failed = make_plan(&p, a);
  if (!failed) {
    const int64_t N = p.padded, T = a->tile, most = ceil_div(p.group_blocks, p.parts);
    const int64_t rows = a->batch * a->length * a->groups * a->states;
    failed = take_scratch(&p, 2 * most * N + N + 6 * T + 2 * T * p.slice + 2 * T * N + 2 * VL + 3 * ceil_div(T * N, VL) + VL);
    p.part_dA = take(p.slots * p.blocks * N * (int64_t)sizeof(vf));
    p.part_dD = take(p.slots * p.blocks * (int64_t)sizeof(vf));
    p.part_bias = take(p.slots * p.blocks * (int64_t)sizeof(vf));
    if (p.parts > 1) {
      p.part_dB = take(p.parts * rows * (int64_t)sizeof(float));
      p.part_dC = take(p.parts * rows * (int64_t)sizeof(float));
      failed = failed || !p.part_dB || !p.part_dC;
    }
    failed = failed || !p.part_dA || !p.part_dD || !p.part_bias;
    if (!failed) {
      const int64_t bytes = a->batch * a->length * a->channels * 4;
      ssm_large_pages(a->du, bytes);
      ssm_large_pages(a->ddelta, bytes);
      ssm_large_pages(a->dz, bytes);
      const int64_t tasks = p.slots * p.parts * a->groups;
      if (p.ends) {
        ssm_parallel(adjoint_ends, &p, p.segments * p.blocks, (int)min64(a->threads, tasks));
        join_adjoints(&p, (vf *)p.scratch, (vf *)p.scratch + N);
      }
      ssm_parallel(backward_task, &p, tasks, (int)a->threads);
      const int few = p.slots * p.blocks * N < 16384 ? 1 : (int)a->threads;
      ssm_parallel(join_slots, &p, p.blocks, few);
      if (p.parts > 1) ssm_parallel(join_parts, &p, ceil_div(rows, JOIN_ROWS), (int)a->threads);
    }
  }
  free_plan(&p);
  return failed ? -1 : 0;
}
