// A product searched by a cheaper one first: most columns are ruled out by a proven bound, the rest computed in float32.
#pragma once

#include "sieves.h"

namespace clipsteer {

constexpr int64_t kScreenRows = 512;
constexpr int64_t kWholeColumns = 8;  // of rows that are computed whole, which stay in the first-level cache

// How threads share a search: by rows, as a bound that is found of all columns rules out more than those of parts of them;
// where there are too few rows for the columns to be made ready by every thread, by columns. That pays from a row for some
// 200 columns on. Search g * slots + s has the rows of group g and the columns of slot s.
struct Team {
  static constexpr int64_t kLeastRows = 64, kColumns = 192;
  int64_t groups = 1, slots, each;  // rows of a group at a time

  Team(int64_t rows, int64_t n, int64_t most) {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const int64_t least = std::max(kLeastRows, n / kColumns);
    for (int64_t g = 2; g <= threads && g * least <= rows; ++g) {
      if (threads % g == 0) groups = g;
    }
    slots = std::max<int64_t>(std::min(threads / groups, (n + 63) / 64), 1);
    const int64_t blocks = std::max<int64_t>((rows + groups * most - 1) / (groups * most), 1), parts = groups * blocks;
    each = std::max<int64_t>((rows + parts - 1) / parts, 1);
    if (groups > 1) each = padded(each);
  }
  int64_t searches() const { return groups * slots; }
  int64_t block() const { return groups * each; }
};

template <class Search>
constexpr bool kWaits = requires { &Search::note; };

// What is looked for in rows, of which each member of a team has its own:
//   begin(first, count)   rows first to first + count - 1 come next
//   done(r)               row r of these had a NaN
//   bounded(r), bound(r)  columns whose pre-activation (less their threshold) is at most the bound are not wanted
//   take(r, value, c)     a column that may be; columns come in ascending order
// One that `waits`, where the bounds are narrow, is told of them, and computes what it cannot do without later, when most
// have been passed by others; what note or take says is whether that is now:
//   note(r, lower, upper, c)  a column between these
//   settle(r, sums)           computes columns in float32: sums(columns, count, out)
// `threshold`, if any, is a column's own; `expected` is how many columns a row will have. finish(first, begin, end, work)
// is told of rows begin to end of the block that starts at `first`, by any thread, and how many columns of each row of the
// block were computed.
template <class Sieve, class T, class Search, class Finish>
void search_by(const T* x, const Dictionary<T>& W, const float* threshold, int64_t rows, const Team& team,
               int64_t expected, std::vector<Search>& searches, Finish&& finish) {
  using torch::stable::parallel_for;
  const int64_t n = W.n, d = W.d;
  const float *b = W.bias, *scale = W.scale;
  const int64_t panels = (n + 63) / 64, slots = team.slots, members = team.searches(), block = team.block();
  // A pre-activation of a sum of products.
  const auto finished = [&](float sum, int64_t column) {
    const float found = sum + (b ? b[column] : 0);
    return scale ? found * scale[column] : found;
  };
  Sieve sieve(W, members, block);
  Buffer<T> turned(W.transposed() ? members * 64 * d : 0);
  Buffer<float> wide_x(kNarrow<T> ? block * d : 0);
  std::vector<ScreenRow> bounds(block);
  std::vector<char> usable(block);
  std::vector<int64_t> computed(slots * block);

  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t present = std::min(block, rows - r0);
    sieve.begin(x + r0 * d, present);
    const float* inputs = nullptr;
    if constexpr (!kNarrow<T>) inputs = x + r0 * d;
    if constexpr (kNarrow<T>) inputs = wide_x.get();
    parallel_for(0, present, 16, [&](int64_t begin, int64_t end) {
      widened(x + (r0 + begin) * d, wide_x.get() + (kNarrow<T> ? begin * d : 0), (end - begin) * d);
      for (int64_t r = begin; r < end; ++r) bounds[r] = sieve.take_row(r, inputs + r * d, usable[r]);
    });
    parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> whole;  // the rows that are computed whole; the others are wanted
      std::vector<ScreenRow> lines(team.each);
      std::vector<uint64_t> pass(team.each);
      std::vector<char> screened(team.each);  // as long as that pays
      Buffer<uint16_t> hits(64 * team.each);  // the rows that may have a column among theirs
      for (int64_t m = begin; m < end; ++m) {
        const int64_t s = m % slots, place = m / slots * team.each;
        const int64_t count = std::clamp<int64_t>(present - place, 0, team.each);
        const float* input = inputs + place * d;
        Search& search = searches[m];
        search.begin(r0 + place, count);
        int64_t* work = computed.data() + s * block + place;
        T* buffer = turned.get() + (W.transposed() ? m * 64 * d : 0);
        const T* feature[64];  // rows of W of a panel
        std::fill_n(work, count, 0);
        std::copy_n(usable.begin() + place, count, screened.begin());
        std::copy_n(bounds.begin() + place, count, lines.begin());
        // Pre-activations of row r, of any columns.
        const auto sums_of = [&](int64_t r) {
          return [&, r](const int32_t* which, int64_t chosen, float* out) {
            std::vector<const T*> rows_of(chosen);
            for (int64_t i = 0; i < chosen; ++i) rows_of[i] = W.row(which[i]);
            const float* left = input + r * d;
            kernels<T>().rows.dots(&left, 1, rows_of.data(), d, chosen, out, chosen);
            work[r] += chosen;
            for (int64_t i = 0; i < chosen; ++i) out[i] = finished(out[i], which[i]);
          };
        };
        // Columns [c, c + columns) of a panel that begins with `first`, of some rows in float32, a row of W with several
        // rows of x at a time.
        const auto compute = [&](const uint16_t* which, int64_t chosen, int64_t first, int64_t c0, int64_t columns) {
          const float* left[kDotRows];
          float value[kDotRows][kWholeColumns];
          for (int64_t at = 0; at < chosen; at += kDotRows) {
            const int together = int(std::min<int64_t>(kDotRows, chosen - at));
            for (int i = 0; i < together; ++i) left[i] = input + which[at + i] * d;
            kernels<T>().rows.dots(left, together, feature + c0, d, columns, value[0], kWholeColumns);
            for (int i = 0; i < together; ++i) {
              work[which[at + i]] += columns;
              for (int64_t c = 0; c < columns; ++c) {
                const int64_t place = first + c0 + c;
                const float found = finished(value[i][c], place);
                if constexpr (kWaits<Search>) {
                  if (search.take(which[at + i], found, place)) search.settle(which[at + i], sums_of(which[at + i]));
                } else {
                  search.take(which[at + i], found, place);
                }
              }
            }
          }
        };
        const int64_t start = panels * s / slots, end_of_slot = panels * (s + 1) / slots;
        for (int64_t p = start; p < end_of_slot; ++p) {
          const int64_t first = p * 64, columns = std::min<int64_t>(64, n - first);
          W.rows(first, columns, buffer, feature);
          bool any = false;
          whole.clear();
          for (int64_t r = 0; r < count; ++r) {
            lines[r].wanted = screened[r] && !search.done(r) && search.bounded(r);
            lines[r].bound = lines[r].wanted ? search.bound(r) : 0;
            if (!search.done(r) && !lines[r].wanted) whole.push_back(uint16_t(r));
            any |= lines[r].wanted;
          }
          for (int64_t c = 0; c < columns; c += kWholeColumns) {
            compute(whole.data(), int64_t(whole.size()), first, c, std::min(kWholeColumns, columns - c));
          }
          if (!any) continue;
          ScreenColumns column = {};
          sieve.take_columns(m, feature, columns, column);
          for (int64_t c = 0; c < columns; ++c) {
            const float factor = scale ? scale[first + c] : 1;
            if (scale) multiply_column(column, c, factor);
            column.base[c] = b ? raised(b[first + c] * factor) : 0;
            if (threshold) column.base[c] += raised(-threshold[first + c]);
          }
          // The next features come from memory meanwhile.
          const int64_t coming = p + 1 < end_of_slot ? std::min<int64_t>(64, n - first - columns) : 0;
          sieve.screen(m, feature, place, lines.data(), count, columns, column, W.ahead(first + columns, coming),
                       pass.data());
          const uint64_t inside = columns == 64 ? ~uint64_t(0) : (uint64_t(1) << columns) - 1;
          if constexpr (kWaits<Search>) {
            for (int64_t r = 0; r < count; ++r) {
              const float* product = sieve.product(m, place + r);
              for (uint64_t bits = lines[r].wanted ? pass[r] & inside : 0; bits; bits &= bits - 1) {
                const int c = __builtin_ctzll(bits);
                const float base = column.base[c], width = lines[r].error * column.norm[c];
                const float upper = product[c] * column.step[c] + base + width;
                if (search.note(r, upper - lowered(width, base), upper, first + c)) search.settle(r, sums_of(r));
              }
            }
          } else {
            int64_t hit[64] = {};
            for (int64_t r = 0; r < count; ++r) {
              for (uint64_t bits = lines[r].wanted ? pass[r] & inside : 0; bits; bits &= bits - 1) {
                const int c = __builtin_ctzll(bits);
                hits.get()[c * count + hit[c]++] = uint16_t(r);
              }
            }
            for (int64_t c = 0; c < columns; ++c) compute(hits.get() + c * count, hit[c], first, c, 1);
          }
          // Computing more than this one by one costs more than computing the row whole.
          const int64_t most = 16 * expected + 512 + (p - start + 1) * 64 / 16;
          for (int64_t r = 0; r < count; ++r) screened[r] &= !lines[r].wanted || work[r] <= most;
        }
        if constexpr (kWaits<Search>) {
          for (int64_t r = 0; r < count; ++r) search.settle(r, sums_of(r));
        }
      }
    });
    parallel_for(0, present, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = 1; s < slots; ++s) {
        for (int64_t r = begin; r < end; ++r) computed[r] += computed[s * block + r];
      }
      finish(r0, begin, end, computed.data());
    });
  }
}

template <class T, class Search, class Finish>
void search_screened(const T* x, const Dictionary<T>& W, const float* threshold, int64_t rows, const Team& team,
                     int64_t expected, std::vector<Search>& searches, Screen screen, Finish&& finish) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (kWaits<Search> || screen == Screen::pairs) {
      return search_by<Pairs>(x, W, threshold, rows, team, expected, searches, finish);
    }
  }
  if constexpr (!kWaits<Search>) search_by<Bytes<T>>(x, W, threshold, rows, team, expected, searches, finish);
}

}  // namespace clipsteer
