#define _DEFAULT_SOURCE /* madvise */

#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef void (*Launch)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static Launch launch; /* GOMP_parallel, or NULL */

void ssm_set_parallel(void *entry) { launch = (Launch)entry; }

typedef struct {
  void (*task)(void *, int64_t, int);
  void *context;
  int64_t tasks;
  int threads;
  atomic_llong next;
  atomic_int joined;
} Job;

/* States that fade away become subnormal numbers, with which some processors compute a hundred times slower (a
 * trained model's scan took seven times as long on an Intel Xeon). Inside the kernels they are 0, as on a GPU; the
 * thread's own mode, which `flush_subnormals` returns, is put back afterwards. */
#if defined(__SSE2__)
typedef unsigned Mode;
static Mode flush_subnormals(void) {
  Mode mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040); /* results and operands */
  return mode;
}
static void restore(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t Mode;
static Mode flush_subnormals(void) {
  Mode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  __asm__ volatile("msr fpcr, %0" : : "r"(mode | ((Mode)1 << 24)));
  return mode;
}
static void restore(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
typedef int Mode;
static Mode flush_subnormals(void) { return 0; }
static void restore(Mode mode) { (void)mode; }
#endif

static void work(void *data) {
  Job *job = data;
  int thread = atomic_fetch_add(&job->joined, 1);
  if (thread >= job->threads) return; /* a runtime that starts more threads than it was asked for */
  Mode mode = flush_subnormals();
  for (;;) {
    int64_t i = atomic_fetch_add(&job->next, 1);
    if (i >= job->tasks) break;
    job->task(job->context, i, thread);
  }
  restore(mode);
}

static void *work_in_thread(void *data) {
  work(data);
  return NULL;
}

void ssm_parallel(void (*task)(void *, int64_t, int), void *context, int64_t tasks, int threads) {
  if (threads > tasks) threads = (int)tasks;
  if (threads <= 1) {
    Mode mode = flush_subnormals();
    for (int64_t i = 0; i < tasks; i++) task(context, i, 0);
    restore(mode);
    return;
  }
  Job job = {.task = task, .context = context, .tasks = tasks, .threads = threads};
  atomic_init(&job.next, 0);
  atomic_init(&job.joined, 0);
  if (launch) {
    launch(work, &job, (unsigned)threads, 0);
    return;
  }
  enum { MOST = 256 };
  pthread_t started[MOST];
  int n = 0;
  while (n < threads - 1 && n < MOST && pthread_create(&started[n], NULL, work_in_thread, &job) == 0) n++;
  work(&job);
  for (int i = 0; i < n; i++) pthread_join(started[i], NULL);
}

#define LARGE_PAGE ((int64_t)1 << 21)

void ssm_large_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!memory || bytes < 2 * LARGE_PAGE) return;
  uintptr_t from = ((uintptr_t)memory + LARGE_PAGE - 1) & ~(uintptr_t)(LARGE_PAGE - 1);
  uintptr_t to = ((uintptr_t)memory + (uintptr_t)bytes) & ~(uintptr_t)(LARGE_PAGE - 1);
  madvise((void *)from, to - from, MADV_HUGEPAGE); /* advice only: a refusal changes nothing */
#else
  (void)memory;
  (void)bytes;
#endif
}
