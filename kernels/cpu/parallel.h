/* Tasks handed out to threads.
 *
 * torch's own OpenMP threads do the work where they can be reached (GOMP_parallel of the library torch has already
 * loaded, given by `ssm_set_parallel`): a second pool would fight the first one's spinning threads for the cores.
 * Elsewhere plain threads are started for the call.
 */
#ifndef SSM_PARALLEL_H
#define SSM_PARALLEL_H

#include <stdint.h>

/* Runs task(context, i, thread) for each i in [0, tasks), on at most `threads` threads, thread in [0, threads).
 * Tasks are taken as threads get free; no result may depend on which thread ran which task. */
void ssm_parallel(void (*task)(void *context, int64_t i, int thread), void *context, int64_t tasks, int threads);

/* Asks for large pages under a result that is written once: first touching 4 KB pages costs more than computing what
 * goes there. Does nothing for small ones or where the system has no such call. */
void ssm_large_pages(void *memory, int64_t bytes);

#endif
