// Portable vector code: a loop marked GDFQ_SIMD inside a function marked GDFQ_CLONES is compiled for three levels of
// x86-64, and the loader picks the best one that the machine has. Elsewhere it is compiled once, for the target given.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(GDFQ_NO_CLONES)
#define GDFQ_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define GDFQ_CLONES
#endif

// The iterations of the loop are independent. (Not `omp simd`: GCC gives a struct in the body of such a loop one copy
// for each vector lane, in memory, and then does not vectorize the loop.)
#if defined(__clang__)
#define GDFQ_SIMD _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GDFQ_SIMD _Pragma("GCC ivdep")
#else
#define GDFQ_SIMD
#endif

// The loop stays one until it is vectorized: GCC unrolls a short body of constant length first, vectorizes along the
// loop around it instead, and shuffles every element.
#if defined(__GNUC__) && !defined(__clang__)
#define GDFQ_ROLLED _Pragma("GCC unroll 1")
#else
#define GDFQ_ROLLED
#endif

// For a lambda that a cloned function calls: inlined, it takes the clone's instruction set.
#if defined(__GNUC__)
#define GDFQ_INLINE_LAMBDA __attribute__((always_inline))
#else
#define GDFQ_INLINE_LAMBDA
#endif
