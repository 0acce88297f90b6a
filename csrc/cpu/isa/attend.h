// Attention of one tile of query rows over its listed keys: steps of a few hundred keys, one online softmax.
#pragma once

#include "products.h"

namespace trimix {
namespace {

// Keys of a step. Each step rescales the sums once; its packed keys stay in the L1 cache, its scores in L2.
constexpr int64_t kStep = 256;
// Rows that go through a step together.
constexpr int64_t kChunk = 64;
constexpr int64_t kMaxSegments = kStep / 16;

// Hands out parts of a thread's working memory, or only measures them.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

template <class Products>
class Tile {
  using Unit = typename Products::Unit;
  static constexpr int64_t kUnitDepth = kDepth<Unit>;

 public:
  static int64_t padded_head(const Problem& p) { return round_up(p.head_size, Products::kHeadMultiple); }

  static int64_t packed_bytes(const Problem& p) {
    return round_up(round_up(key_end(p), p.block_size), kPanel) * padded_head(p) / kUnitDepth * int64_t(sizeof(Unit));
  }

  static int64_t scratch_bytes(const Problem& p) {
    Arena arena{nullptr};
    Tile(p, arena, round_up(p.block_size, kChunk));
    return arena.used;
  }

  static void pack_block(const Problem& p, int64_t kv_head, int64_t block, void* packed_k, void* packed_v) {
    const int64_t padded = padded_head(p);
    alignas(64) Unit rows[16 * kMaxHeadSize / kUnitDepth];
    const void *keys[16], *values[16];
    for (int64_t key = block * p.block_size; key < (block + 1) * p.block_size; key += 16) {
      for (int64_t i = 0; i < 16; ++i) {
        const bool exists = key + i < key_end(p);
        keys[i] = exists ? element(p.k, kv_head * p.k_head + (key + i) * p.k_key, p.dtype) : nullptr;
        values[i] = exists ? element(p.v, kv_head * p.v_head + (key + i) * p.v_key, p.dtype) : nullptr;
      }
      pack_keys(p, keys, values, padded, rows, key_place(static_cast<Unit*>(packed_k), key, padded),
                value_place(static_cast<Unit*>(packed_v), key, padded));
    }
  }

  static int64_t attend(const Problem& p, const void* packed_k, const void* packed_v, int64_t head, int64_t number,
                        void* scratch) {
    const int64_t own = first_tile(p) + number;
    const int64_t first = max(p.position, own * p.block_size);
    const int64_t end = min(key_end(p), (own + 1) * p.block_size);
    Arena arena{static_cast<char*>(scratch)};
    Tile tile(p, arena, round_up(end - first, Products::kRows));
    tile.head_ = head;
    tile.first_ = first;
    tile.num_rows_ = end - first;
    tile.packed_k_ = static_cast<const Unit*>(packed_k);
    tile.packed_v_ = static_cast<const Unit*>(packed_v);
    tile.load_queries();
    tile.walk_columns(number);
    tile.walk_blocks(number);
    tile.finish_step();
    tile.write();
    return tile.keys_loaded_;
  }

 private:
  Tile(const Problem& p, Arena& arena, int64_t rows)
      : p_(p),
        padded_(padded_head(p)),
        rows_(rows),
        q_(arena.take<Unit>(rows * padded_ / kUnitDepth)),
        sums_(arena.take<float>(rows * padded_)),
        maxima_(arena.take<float>(rows)),
        totals_(arena.take<Vec>(rows)),
        alpha_(arena.take<float>(kChunk)),
        scores_(arena.take<float>(kChunk * kStep)),
        probs_(arena.take<Unit>(kChunk * kStep / kUnitDepth)),
        columns_k_(arena.take<Unit>(kStep * padded_ / kUnitDepth)),
        columns_v_(arena.take<Unit>(kStep * padded_ / kUnitDepth)),
        rows_in_(arena.take<Unit>(16 * padded_ / kUnitDepth)) {}

  template <class T>
  static T* key_place(T* packed_k, int64_t key, int64_t padded) {
    return packed_k + key / kPanel * (kPanel * padded / kUnitDepth) + key % kPanel;
  }
  template <class T>
  static T* value_place(T* packed_v, int64_t key, int64_t padded) {
    return packed_v + key / kUnitDepth * padded;
  }

  void load_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t offset = (first_ - p_.position + row) * p_.q_row + head_ * p_.q_head;
      const void* source = row < num_rows_ ? element(p_.q, offset, p_.dtype) : nullptr;
      load_row(source, p_.dtype, p_.head_size, padded_, q_ + row * padded_ / kUnitDepth);
      maxima_[row] = kMinusInfinity;
      totals_[row] = Vec{};
    }
    memset(sums_, 0, rows_ * padded_ * sizeof(float));
  }

  void walk_columns(int64_t number) {
    if (p_.column_count == nullptr) return;
    const int64_t count = p_.column_count[head_ * p_.column_count_head + number * p_.column_count_tile];
    const int32_t* columns = p_.column_index + head_ * p_.column_index_head + number * p_.column_index_tile;
    for (int64_t place = 0; place < count; place += kPanel) add_columns(columns, place, min(kPanel, count - place));
  }

  // Gathers up to a panel of single keys and appends it to the step.
  void add_columns(const int32_t* columns, int64_t place, int64_t loaded) {
    const int64_t count = round_up(loaded, Products::kKeyMultiple);
    make_room(count);
    Unit* k = columns_k_ + num_gathered_ * (kPanel * padded_ / kUnitDepth);
    Unit* v = columns_v_ + num_gathered_ * (kPanel * padded_ / kUnitDepth);
    ++num_gathered_;
    const int64_t kv_head = head_ / (p_.num_heads / p_.num_kv_heads);
    const void *keys[16], *values[16];
    for (int64_t group = 0; group < count; group += 16) {
      for (int64_t i = 0; i < 16; ++i) {
        keys[i] = values[i] = nullptr;
        if (group + i >= loaded) continue;
        const int64_t key = columns[(place + group + i) * p_.column_index_place];
        keys[i] = element(p_.k, kv_head * p_.k_head + key * p_.k_key, p_.dtype);
        values[i] = element(p_.v, kv_head * p_.v_head + key * p_.v_key, p_.dtype);
      }
      pack_keys(p_, keys, values, padded_, rows_in_, k + group, value_place(v, group, padded_));
    }
    append(Segment<Unit>{k, v, count, loaded, 0, -1});
  }

  void walk_blocks(int64_t number) {
    const int64_t count = p_.block_count[head_ * p_.block_count_head + number * p_.block_count_tile];
    const int32_t* blocks = p_.block_index + head_ * p_.block_index_head + number * p_.block_index_tile;
    for (int64_t place = 0; place < count; ++place) {
      const int64_t begin = blocks[place * p_.block_index_place] * p_.block_size;
      const int64_t end = min(begin + p_.block_size, key_end(p_));
      for (int64_t key = begin; key < end;) {
        // Up to the end of the panel.
        const int64_t next = min((key / kPanel + 1) * kPanel, begin + p_.block_size);
        make_room(next - key);
        append(Segment<Unit>{key_place(packed_k_, key, padded_), value_place(packed_v_, key, padded_), next - key,
                             min(next, end) - key, 0, key});
        key = next;
      }
    }
  }

  void make_room(int64_t count) {
    if (step_keys_ + count > kStep || num_gathered_ == kStep / kPanel) finish_step();
  }

  void append(Segment<Unit> segment) {
    segment.offset = step_keys_;
    segments_[num_segments_++] = segment;
    step_keys_ += segment.count;
    keys_loaded_ += segment.loaded;
  }

  void finish_step() {
    if (num_segments_ == 0) return;
    const int64_t score_row = step_keys_;
    for (int64_t row = 0; row < rows_; row += kChunk) {
      const int64_t rows = min(kChunk, rows_ - row);
      const Unit* q = q_ + row * padded_ / kUnitDepth;
      for (int64_t s = 0; s < num_segments_; ++s) {
        products_.scores(q, rows, padded_, segments_[s], scores_ + segments_[s].offset, score_row);
        hide(segments_[s], row, rows, score_row);
      }
      for (int64_t i = 0; i < rows; ++i) softmax_row(row + i, i, score_row);
      products_.values(probs_, score_row / kUnitDepth, rows, padded_, segments_, num_segments_, alpha_,
                       sums_ + row * padded_);
    }
    num_segments_ = num_gathered_ = step_keys_ = 0;
  }

  // Sets the scores of keys that a row doesn't see to minus infinity.
  void hide(const Segment<Unit>& segment, int64_t row, int64_t rows, int64_t score_row) {
    const bool diagonal = segment.key >= 0 && segment.key + segment.count - 1 > first_ + row;
    const bool banded = segment.key >= 0 && p_.band != nullptr && !in_band(segment, first_ + row + rows - 1);
    if (!diagonal && !banded && segment.loaded == segment.count) return;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t position = first_ + row + i;
      // Places of the segment that the row sees: before `end`, and before `n_init` or from `window` on.
      const int64_t end = segment.key < 0 ? segment.loaded : min(segment.loaded, position + 1 - segment.key);
      const int64_t n_init = banded ? this->n_init() - segment.key : 0;
      const int64_t window = banded ? position + 1 - n_local() - segment.key : 0;
      float* scores = scores_ + segment.offset + i * score_row;
      const IntVec last = splat(int32_t(max(end, int64_t(0))));
      const IntVec sinks = splat(int32_t(max(min(n_init, kPanel), int64_t(0))));
      const IntVec from = splat(int32_t(max(min(window, kPanel), int64_t(0))));
      IntVec place = lane_numbers();
      for (int64_t key = 0; key < segment.count; key += kLanes, place += kLanes) {
        const IntVec seen = (place < last) & ((place < sinks) | (place >= from));
        store(scores + key, seen ? load(scores + key) : splat(kMinusInfinity));
      }
    }
  }

  int64_t n_init() const { return p_.band[head_ * p_.band_head]; }
  int64_t n_local() const { return p_.band[head_ * p_.band_head + p_.band_side]; }

  // Whether the band hides none of a segment's keys from rows up to `last`.
  bool in_band(const Segment<Unit>& segment, int64_t last) const {
    return segment.key + segment.count <= n_init() || segment.key > last - n_local();
  }

  // Probabilities of one row's scores, relative to the largest so far; leaves in alpha_ what earlier sums shrink by.
  void softmax_row(int64_t row, int64_t place, int64_t score_row) {
    constexpr float kLog2E = 1.4426950408889634f;
    const Vec scale = splat(p_.scale * kLog2E);
    const float* scores = scores_ + place * score_row;
    Vec most = splat(maxima_[row]);
    for (int64_t key = 0; key < step_keys_; key += kLanes) most = max(most, load(scores + key) * scale);
    const float maximum = max_lane(most);
    // A row that has seen no key yet: any finite number will do.
    const float reference = maximum == kMinusInfinity ? 0.0f : maximum;
    alpha_[place] = exp2_one(maxima_[row] - reference);
    maxima_[row] = maximum;
    Vec total = totals_[row] * alpha_[place];
    Unit* probs = probs_ + place * score_row / kUnitDepth;
    for (int64_t key = 0; key < step_keys_; key += 2 * kLanes) total += exponentials(scores, key, scale, reference, probs);
    totals_[row] = total;
  }

  Vec exponentials(const float* scores, int64_t key, Vec scale, float reference, float* probs) const {
    const Vec low = exp2(load(scores + key) * scale - reference);
    store(probs + key, low);
    if (key + kLanes >= step_keys_) return low;
    const Vec high = exp2(load(scores + key + kLanes) * scale - reference);
    store(probs + key + kLanes, high);
    return low + high;
  }

#ifdef __AVX512BF16__
  Vec exponentials(const float* scores, int64_t key, Vec scale, float reference, Pair* probs) const {
    const Vec low = exp2(load(scores + key) * scale - reference);
    if (key + kLanes >= step_keys_) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(probs + key / 2), (__m256i)_mm512_cvtneps_pbh((__m512)low));
      return low;
    }
    const Vec high = exp2(load(scores + key + kLanes) * scale - reference);
    _mm512_storeu_si512(probs + key / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    return low + high;
  }
#endif

  void write() {
    for (int64_t row = 0; row < num_rows_; ++row) {
      float* sums = sums_ + row * padded_;
      const Vec inverse = splat(1.0f / sum_lanes(totals_[row]));
      for (int64_t d = 0; d < padded_; d += kLanes) store(sums + d, load(sums + d) * inverse);
      const int64_t offset = (first_ - p_.position + row) * p_.out_row + head_ * p_.out_head;
      store_row(sums, p_.dtype, p_.head_size, const_cast<char*>(element(p_.out, offset, p_.dtype)));
    }
  }

  const Problem& p_;
  const int64_t padded_, rows_;
  Unit* q_;        // [rows][padded]
  float* sums_;    // [rows][padded], of values weighted by probabilities
  float* maxima_;  // [rows], of scaled scores
  Vec* totals_;    // [rows], of probabilities, lane by lane
  float* alpha_;   // [chunk]
  float* scores_;  // [chunk][step keys]
  Unit* probs_;    // [chunk][step keys]
  Unit *columns_k_, *columns_v_;
  Unit* rows_in_;
  Segment<Unit> segments_[kMaxSegments];
  int64_t num_segments_ = 0, num_gathered_ = 0, step_keys_ = 0, keys_loaded_ = 0;
  int64_t head_ = 0, first_ = 0, num_rows_ = 0;
  const Unit *packed_k_ = nullptr, *packed_v_ = nullptr;
  Products products_;
};

template <class Products>
constexpr Kernel kernel_of(bool bf16_only) {
  using T = Tile<Products>;
  return Kernel{bf16_only, Products::kKeyMultiple, T::packed_bytes, T::scratch_bytes, T::pack_block, T::attend};
}

}  // namespace
}  // namespace trimix
