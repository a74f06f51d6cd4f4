/* Depthwise causal convolution on the CPU. See causal_conv1d.h for the equations and the arguments.
 *
 * A lane holds a channel. Sequences are cut in tiles of TILE steps, each served on its own: forward reads width - 1
 * rows before it, backward those and width - 1 rows after it. Work is cut in tasks, (slot of whole tiles) x (part of
 * the channel blocks); sums over time (dweight, dbias) go to one buffer a slot, joined in fixed order: the result
 * depends on the number of threads, never on their timing.
 */
#include "causal_conv1d.h"

#include "parallel.h"
#include "vec.h"

#define TILE 64

typedef struct {
  const ConvArgs *a;
  int64_t blocks, tiles, slots, parts;
  int64_t *first_tile; /* (sequences + 1,) */
  vf *part_dw, *part_db; /* (slots, blocks, width), (slots, blocks) */
  char *scratch;
  int64_t scratch_size; /* bytes a thread */
} Plan;

/* A tile: steps [at, at + steps) in scan order of a sequence of `length` steps. */
typedef struct {
  int64_t sequence, batch;
  int64_t row, direction; /* row of the sequence's step 0, row step from one step to the next */
  int64_t length, at, steps;
} Tile;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void *take(int64_t bytes) { return aligned_alloc(64, (size_t)(ceil_div(max64(bytes, 1), 64) * 64)); }

static Tile sequence_at(const ConvArgs *a, int64_t s) {
  Tile t = {.sequence = s, .batch = a->borders ? 0 : s, .direction = a->reverse ? -1 : 1};
  int64_t start = a->borders ? a->borders[s] : 0;
  t.length = a->borders ? a->borders[s + 1] - start : a->length;
  t.row = a->reverse ? start + t.length - 1 : start;
  return t;
}

static int make_plan(Plan *p, const ConvArgs *a) {
  memset(p, 0, sizeof *p);
  p->a = a;
  p->blocks = ceil_div(a->channels, VL);
  p->first_tile = take((a->sequences + 1) * (int64_t)sizeof(int64_t));
  if (!p->first_tile) return -1;
  p->first_tile[0] = 0;
  for (int64_t s = 0; s < a->sequences; s++)
    p->first_tile[s + 1] = p->first_tile[s] + ceil_div(sequence_at(a, s).length, TILE);
  p->tiles = p->first_tile[a->sequences];
  /* A few tasks a thread, so that a thread that starts late does not hold up the rest. */
  int64_t wanted = a->threads <= 1 || p->tiles * p->blocks < 16 ? 1 : 4 * a->threads;
  p->slots = min64(wanted, p->tiles);
  p->parts = p->slots ? min64(ceil_div(wanted, p->slots), p->blocks) : 0;
  return 0;
}

static int take_scratch(Plan *p, int64_t vectors) {
  p->scratch_size = vectors * (int64_t)sizeof(vf);
  p->scratch = take(p->scratch_size * max64(1, min64(p->a->threads, p->slots * p->parts)));
  return p->scratch ? 0 : -1;
}

static void free_plan(Plan *p) {
  free(p->first_tile);
  free(p->part_dw);
  free(p->part_db);
  free(p->scratch);
}

typedef struct {
  int64_t slot, first, last, from, to; /* blocks [first, last), tiles [from, to) */
} Task;

static Task task_at(const Plan *p, int64_t index) {
  Task t;
  int64_t part = index % p->parts;
  t.slot = index / p->parts;
  t.first = part * p->blocks / p->parts;
  t.last = (part + 1) * p->blocks / p->parts;
  t.from = t.slot * p->tiles / p->slots;
  t.to = (t.slot + 1) * p->tiles / p->slots;
  return t;
}

/* The sequence that holds tile `index`, not before sequence `s`. */
static Tile tile_at(const Plan *p, int64_t index, int64_t s) {
  while (p->first_tile[s + 1] <= index) s++;
  Tile t = sequence_at(p->a, s);
  t.at = (index - p->first_tile[s]) * TILE;
  t.steps = min64(TILE, t.length - t.at);
  return t;
}

static void load_weight(const ConvArgs *a, int64_t channel, int w, vf *rows) {
  for (int64_t k = 0; k < a->width; k++) {
    rows[k] = (vf){0};
    for (int j = 0; j < w; j++) rows[k][j] = a->weight[(channel + j) * a->width + k];
  }
}

/* rows[i] = e_{from + i} of the block for i < count; from + count may not pass the sequence's end. */
INLINE void load_inputs(const ConvArgs *a, int full, int w, int64_t channel, Tile t, int64_t from, int64_t count,
                        vf *rows) {
  const int64_t before = a->width - 1;
  int64_t i = 0;
  for (; i < count && from + i < before; i++) {
    rows[i] = (vf){0};
    if (a->initial)
      for (int j = 0; j < w; j++)
        rows[i][j] = a->initial[(t.sequence * a->channels + channel + j) * before + from + i];
  }
  const float *x = a->x + t.batch * a->x_batch + (t.row + t.direction * (from + i - before)) * a->x_time + channel;
  for (; i < count; i++, x += t.direction * a->x_time) rows[i] = v_load(x, full, w);
}

/* ---- forward ----------------------------------------------------------------------------------------------- */

INLINE void forward_block(const ConvArgs *a, int full, int64_t width, int w, int64_t channel, Tile t, const vf *weight,
                          vf *e) {
  load_inputs(a, full, w, channel, t, t.at, t.steps + width - 1, e);
  const vf bias = a->bias ? v_load(a->bias + channel, full, w) : (vf){0};
  float *out = a->out + (t.batch * a->length + t.row + t.direction * t.at) * a->channels + channel;
  for (int64_t i = 0; i < t.steps; i++, out += t.direction * a->channels) {
    vf y = bias;
    for (int64_t k = 0; k < width; k++) y += weight[k] * e[i + k];
    if (a->silu) y *= v_sigmoid(y);
    v_store(out, y, full, w);
  }
}

static void forward_task(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const ConvArgs *a = p->a;
  Task task = task_at(p, index);
  vf *weight = (vf *)(p->scratch + thread * p->scratch_size);
  vf *e = weight + (task.last - task.first) * a->width;
  for (int64_t k = task.first; k < task.last; k++)
    load_weight(a, k * VL, (int)min64(VL, a->channels - k * VL), weight + (k - task.first) * a->width);
  int64_t s = 0;
  for (int64_t i = task.from; i < task.to; i++) {
    Tile t = tile_at(p, i, s);
    s = t.sequence;
    for (int64_t k = task.first; k < task.last; k++) {
      const vf *wk = weight + (k - task.first) * a->width;
      int w = (int)min64(VL, a->channels - k * VL);
      if (w == VL && a->width == 4)
        forward_block(a, 1, 4, w, k * VL, t, wk, e);
      else if (w == VL)
        forward_block(a, 1, a->width, w, k * VL, t, wk, e);
      else
        forward_block(a, 0, a->width, w, k * VL, t, wk, e);
    }
  }
}

/* final state = e_{length ..}; also what a sequence of length 0 hands through. */
static void store_final(const ConvArgs *a) {
  const int64_t before = a->width - 1;
  for (int64_t s = 0; s < a->sequences; s++) {
    Tile t = sequence_at(a, s);
    for (int64_t i = 0; i < before; i++) {
      int64_t from = t.length + i; /* index in e */
      float *to = a->final + s * a->channels * before + i;
      if (from < before)
        for (int64_t c = 0; c < a->channels; c++)
          to[c * before] = a->initial ? a->initial[(s * a->channels + c) * before + from] : 0.0f;
      else {
        const float *x = a->x + t.batch * a->x_batch + (t.row + t.direction * (from - before)) * a->x_time;
        for (int64_t c = 0; c < a->channels; c++) to[c * before] = x[c];
      }
    }
  }
}

int ssm_causal_conv1d_fwd(const ConvArgs *a) {
  Plan p;
  int failed = make_plan(&p, a) || take_scratch(&p, p.blocks * a->width + TILE + a->width);
  if (!failed) {
    ssm_large_pages(a->out, a->batch * a->length * a->channels * 4);
    ssm_parallel(forward_task, &p, p.slots * p.parts, (int)a->threads);
    store_final(a);
  }
  free_plan(&p);
  return failed ? -1 : 0;
}

/* ---- backward ---------------------------------------------------------------------------------------------- */

/* e: (TILE + 2 width,), dpre: (TILE + width,) scratch. dw: (width,) and db run on. */
INLINE void backward_block(const ConvArgs *a, int full, int64_t width, int w, int64_t channel, Tile t, const vf *weight,
                           vf *e, vf *dpre, vf *dw, vf *db) {
  const int64_t before = width - 1;
  const int64_t beyond = min64(before, t.length - t.at - t.steps); /* later steps this tile's inputs still reach */
  const int64_t steps = t.steps + beyond;
  load_inputs(a, full, w, channel, t, t.at, steps + before, e);
  const vf bias = a->bias ? v_load(a->bias + channel, full, w) : (vf){0};
  const float *dout =
      a->dout + t.batch * a->dout_batch + (t.row + t.direction * t.at) * a->dout_time + channel;
  for (int64_t i = 0; i < steps; i++, dout += t.direction * a->dout_time) {
    vf g = v_load(dout, full, w);
    if (a->silu) {
      vf y = bias;
      for (int64_t k = 0; k < width; k++) y += weight[k] * e[i + k];
      vf s = v_sigmoid(y);
      g *= s + y * (s * (1.0f - s));
    }
    dpre[i] = g;
  }
  for (int64_t i = steps; i < t.steps + before; i++) dpre[i] = (vf){0};

  vf sum = {0};
  for (int64_t i = 0; i < t.steps; i++) sum += dpre[i];
  *db += sum;
  for (int64_t k = 0; k < width; k++) {
    sum = (vf){0};
    for (int64_t i = 0; i < t.steps; i++) sum += dpre[i] * e[i + k];
    dw[k] += sum;
  }

  /* The gradient of step i's input is that of e_{i + width - 1}. */
  float *dx = a->dx + (t.batch * a->length + t.row + t.direction * t.at) * a->channels + channel;
  for (int64_t i = 0; i < t.steps; i++, dx += t.direction * a->channels) {
    vf g = {0};
    for (int64_t k = 0; k < width; k++) g += weight[k] * dpre[i + before - k];
    const int64_t last = t.at + i - (t.length - before); /* its place in the final state, if not negative */
    if (a->dfinal && last >= 0)
      for (int j = 0; j < w; j++) g[j] += a->dfinal[(t.sequence * a->channels + channel + j) * before + last];
    v_store(dx, g, full, w);
  }
  if (t.at == 0 && a->dinitial)
    for (int64_t i = 0; i < before; i++) {
      vf g = {0};
      for (int64_t k = 0; k <= i; k++) /* dpre is 0 past the end of the sequence */
        g += weight[k] * dpre[i - k];
      float *to = a->dinitial + (t.sequence * a->channels + channel) * before + i;
      for (int j = 0; j < w; j++) {
        to[j * before] = g[j];
        if (a->dfinal && i >= t.length)
          to[j * before] += a->dfinal[(t.sequence * a->channels + channel + j) * before + i - t.length];
      }
    }
}

static void backward_task(void *context, int64_t index, int thread) {
  const Plan *p = context;
  const ConvArgs *a = p->a;
  Task task = task_at(p, index);
  const int64_t blocks = task.last - task.first;
  vf *weight = (vf *)(p->scratch + thread * p->scratch_size);
  vf *e = weight + blocks * a->width, *dpre = e + TILE + 2 * a->width;
  vf *dw = p->part_dw + (task.slot * p->blocks + task.first) * a->width;
  vf *db = p->part_db + task.slot * p->blocks + task.first;
  memset(dw, 0, (size_t)(blocks * a->width) * sizeof(vf));
  memset(db, 0, (size_t)blocks * sizeof(vf));
  for (int64_t k = 0; k < blocks; k++) {
    int64_t channel = (task.first + k) * VL;
    load_weight(a, channel, (int)min64(VL, a->channels - channel), weight + k * a->width);
  }
  int64_t s = 0;
  for (int64_t i = task.from; i < task.to; i++) {
    Tile t = tile_at(p, i, s);
    s = t.sequence;
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t channel = (task.first + k) * VL, at = k * a->width;
      int w = (int)min64(VL, a->channels - channel);
      if (w == VL && a->width == 4)
        backward_block(a, 1, 4, w, channel, t, weight + at, e, dpre, dw + at, db + k);
      else if (w == VL)
        backward_block(a, 1, a->width, w, channel, t, weight + at, e, dpre, dw + at, db + k);
      else
        backward_block(a, 0, a->width, w, channel, t, weight + at, e, dpre, dw + at, db + k);
    }
  }
}

static void join_slots(const Plan *p) {
  const ConvArgs *a = p->a;
  for (int64_t b = 0; b < p->blocks; b++) {
    int w = (int)min64(VL, a->channels - b * VL);
    for (int64_t k = 0; k < a->width; k++) {
      vf sum = {0};
      for (int64_t s = 0; s < p->slots; s++) sum += p->part_dw[(s * p->blocks + b) * a->width + k];
      for (int j = 0; j < w; j++) a->dweight[(b * VL + j) * a->width + k] = sum[j];
    }
    if (a->dbias) {
      vf sum = {0};
      for (int64_t s = 0; s < p->slots; s++) sum += p->part_db[s * p->blocks + b];
      v_store(a->dbias + b * VL, sum, 0, w);
    }
  }
}

int ssm_causal_conv1d_bwd(const ConvArgs *a) {
  Plan p;
  int failed = make_plan(&p, a) || take_scratch(&p, p.blocks * a->width + 2 * TILE + 4 * a->width);
  if (!failed) {
    p.part_dw = take(p.slots * p.blocks * a->width * (int64_t)sizeof(vf));
    p.part_db = take(p.slots * p.blocks * (int64_t)sizeof(vf));
    failed = !p.part_dw || !p.part_db;
  }
  if (!failed) {
    ssm_large_pages(a->dx, a->batch * a->length * a->channels * 4);
    ssm_parallel(backward_task, &p, p.slots * p.parts, (int)a->threads);
    join_slots(&p);
    /* A sequence of length 0 has no tile: its initial state is its final state. */
    const int64_t size = a->channels * (a->width - 1);
    if (a->dinitial)
      for (int64_t s = 0; s < a->sequences; s++)
        if (sequence_at(a, s).length == 0) {
          if (a->dfinal)
            memcpy(a->dinitial + s * size, a->dfinal + s * size, (size_t)size * sizeof(float));
          else
            memset(a->dinitial + s * size, 0, (size_t)size * sizeof(float));
        }
  }
  free_plan(&p);
  return failed ? -1 : 0;
}
