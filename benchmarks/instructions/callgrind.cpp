// Callgrind's requests as functions that Python can call. Outside valgrind they do nothing.
#include <valgrind/callgrind.h>

extern "C" {
void start_counting() { CALLGRIND_START_INSTRUMENTATION; }
void zero_counts() { CALLGRIND_ZERO_STATS; }
void dump_counts(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
}
