// What is done to every bfloat16 number of a model, in one pass over a block that stays in a core's
// cache. A bfloat16 is the upper half of a float32: it is widened by a shift and narrowed by
// rounding the lower half away, to nearest, ties to even. Built by hatch_build.py, called by
// arithmetic.py.
//
// The results are the same on every machine: eight lanes whatever the processor has, no fused
// multiply-add (-ffp-contract=off), sums taken in one order.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
  LANES = 8,
  SUMMED = 1024, // numbers summed in float32 before float64 takes the sum over
};
typedef uint16_t Half; // a bfloat16's bits
typedef Half Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE Bits load(const Half *from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Bits);
}

INLINE Floats widened(Bits halves) { return (Floats)(halves << 16); }

INLINE Bits narrowed(Floats floats) {
  Bits bits = (Bits)floats;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

INLINE void store(Half *to, Bits bits) {
  Halves halves = __builtin_convertvector(bits, Halves);
  memcpy(to, &halves, sizeof halves);
}

INLINE int any(Bits mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  memcpy(words, &mask, sizeof mask);
  for (size_t n = 0; n < sizeof mask / 8; n++) all |= words[n];
  return all != 0;
}

// Numbers that base + residual does not restore, bit for bit, by their place.
typedef struct {
  int64_t *places;
  size_t count;
} Lost;

INLINE void compare(Lost *lost, Floats before, Floats residual, Bits after, size_t first) {
  Bits wrong = (Bits)(narrowed(before + residual) != after);
  if (__builtin_expect(any(wrong), 0))
    for (size_t lane = 0; lane < LANES; lane++)
      if (wrong[lane]) lost->places[lost->count++] = (int64_t)(first + lane);
}

// A sum of squares: in float32 for a while, then in float64.
typedef struct {
  Floats lanes;
  double total;
} Squares;

INLINE void take_over(Squares *squares) {
  for (int lane = 0; lane < LANES; lane++) squares->total += squares->lanes[lane];
  squares->lanes = (Floats){0};
}

// Each loop works on whole vectors; the last numbers, too few for one, are worked on in arrays that
// are filled up with zeros.
#define FOR_EACH_VECTOR(first, count) for (; first + LANES <= count; first += LANES)

// One vector of new - old, to bfloat16 or to float32: the other one is NULL.
INLINE void subtract(const Half *old, const Half *new, Half *halves, float *floats, size_t first,
                     Lost *lost, Squares *base, Squares *residual) {
  Bits after = load(new);
  Floats before = widened(load(old)), step = widened(after) - before;
  base->lanes += before * before;
  residual->lanes += step * step;
  if (halves) {
    Bits narrow = narrowed(step);
    store(halves, narrow);
    step = widened(narrow);
  } else {
    memcpy(floats, &step, sizeof step);
  }
  compare(lost, before, step, after, first);
}

INLINE size_t subtract_all(const Half *old, const Half *new, Half *halves, float *floats,
                           int64_t *places, double *squares, size_t count) {
  Lost lost = {places, 0};
  Squares base = {{0}, 0}, residual = {{0}, 0};
  size_t first = 0;
  while (first + LANES <= count) {
    size_t until = count - first < SUMMED ? count : first + SUMMED;
    FOR_EACH_VECTOR(first, until)
      subtract(old + first, new + first, halves ? halves + first : NULL,
               halves ? NULL : floats + first, first, &lost, &base, &residual);
    take_over(&base), take_over(&residual);
  }
  size_t rest = count - first;
  if (rest) {
    Half last_old[LANES] = {0}, last_new[LANES] = {0}, last_halves[LANES];
    float last_floats[LANES];
    memcpy(last_old, old + first, rest * sizeof *old);
    memcpy(last_new, new + first, rest * sizeof *new);
    subtract(last_old, last_new, halves ? last_halves : NULL, last_floats, first, &lost, &base,
             &residual);
    if (halves) memcpy(halves + first, last_halves, rest * sizeof *halves);
    else memcpy(floats + first, last_floats, rest * sizeof *floats);
    take_over(&base), take_over(&residual);
  }
  squares[0] = base.total, squares[1] = residual.total;
  return lost.count;
}

// out = new - old, rounded to bfloat16. Returns how many numbers of `new` are not restored by it,
// and their places; `squares` are the sums of squares of `old` and of the unrounded difference.
size_t subtract_to_bfloat16(const Half *old, const Half *new, Half *out, int64_t *places,
                            double *squares, size_t count) {
  return subtract_all(old, new, out, NULL, places, squares, count);
}

// The same in float32.
size_t subtract_to_float32(const Half *old, const Half *new, float *out, int64_t *places,
                           double *squares, size_t count) {
  return subtract_all(old, new, NULL, out, places, squares, count);
}

INLINE Floats load_floats(const float *from) {
  Floats floats;
  memcpy(&floats, from, sizeof floats);
  return floats;
}

// Returns how many numbers of `new` are not old + residual, rounded, bit for bit; and their places.
size_t find_lost(const Half *old, const float *residual, const Half *new, int64_t *places,
                 size_t count) {
  Lost lost = {places, 0};
  size_t first = 0, rest = count % LANES;
  FOR_EACH_VECTOR(first, count)
    compare(&lost, widened(load(old + first)), load_floats(residual + first), load(new + first),
            first);
  if (rest) {
    Half last_old[LANES] = {0}, last_new[LANES] = {0};
    float last_residual[LANES] = {0};
    memcpy(last_old, old + first, rest * sizeof *old);
    memcpy(last_residual, residual + first, rest * sizeof *residual);
    memcpy(last_new, new + first, rest * sizeof *new);
    compare(&lost, widened(load(last_old)), load_floats(last_residual), load(last_new), first);
  }
  return lost.count;
}

// One vector of old + added, rounded. `infinite` gathers where a sum is NaN or rounds to infinity.
INLINE void add(const Half *old, const float *added, Half *out, Bits *infinite) {
  Floats sum = widened(load(old)) + load_floats(added);
  *infinite |= (Bits)(((Bits)sum & 0x7FFFFFFF) >= 0x7F7F8000);
  store(out, narrowed(sum));
}

// out = old + added, rounded to bfloat16. Returns whether all of it is finite.
size_t add_to_bfloat16(const Half *old, const float *added, Half *out, size_t count) {
  Bits infinite = {0};
  size_t first = 0, rest = count % LANES;
  FOR_EACH_VECTOR(first, count) add(old + first, added + first, out + first, &infinite);
  if (rest) {
    Half last_old[LANES] = {0}, last_out[LANES];
    float last_added[LANES] = {0};
    memcpy(last_old, old + first, rest * sizeof *old);
    memcpy(last_added, added + first, rest * sizeof *added);
    add(last_old, last_added, last_out, &infinite);
    memcpy(out + first, last_out, rest * sizeof *out);
  }
  return !any(infinite);
}
