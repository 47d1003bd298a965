// One pass over the weights for any number of tokens of any number of sessions.
//
// Legend: N tokens of the step, D hidden size, F feed-forward size, H query heads, K key heads.

#include <cmath>
#include <cstring>

#include "model.h"

namespace pp {

namespace {

// Below this much work a job is not worth waking another thread for.
constexpr size_t kSerialBytes = 48 << 10;
constexpr size_t kShortestRunBytes = 16 << 10;
constexpr int kMaxRuns = 4096;  // of tiles in a job

int panel_of(int token, int tokens, int panels) {
  int p = int((int64_t(token) * panels + panels - 1) / tokens);
  while (p > 0 && panel_start(p, tokens, panels) > token) --p;
  while (p + 1 < panels && panel_start(p + 1, tokens, panels) <= token) ++p;
  return p;
}

// Places of a panel of int8 activations in a step of so many tokens; panels of floats are narrow.
int panel_places(const pp_model& m, int tokens) {
  return m.kernels->wide_from && tokens * m.places >= m.kernels->wide_from ? kWidePlaces : kPanelPlaces;
}

// The panel of a token.
struct Panel {
  int index, first, count;
  Panel(int token, int tokens, int places, int panel_places) {
    const int panels = num_panels(tokens, places, panel_places);
    index = panel_of(token, tokens, panels);
    first = panel_start(index, tokens, panels);
    count = panel_start(index + 1, tokens, panels) - first;
  }
};

// Scales of a wide panel's places from `used` on become 0: by chance they may be denormal numbers, which are slow.
void clear_scales(uint8_t* panel, int cols, int used) {
  for (int g = 0; g < cols / kGroup; ++g, panel += kWideRecordBytes) {
    float* scales = reinterpret_cast<float*>(panel + kGroup * kWidePlaces);
    for (int which = 0; which < 2; ++which) memset(scales + which * kWidePlaces + used, 0, size_t(kWidePlaces - used) * sizeof(float));
  }
}

// Puts one row of activations into its panels.
void write_panels(pp_model& m, const float* row, int cols, int token, int tokens, bool as_int, bool as_float) {
  if (as_int) {
    const int width = panel_places(m, tokens);
    const Panel panel(token, tokens, m.places, width);
    const int room = panel_room(panel.count, m.places, width);
    uint8_t* data = m.int_panels.data() + panel_offset(panel.index, panel.first, m.places, width, cols);
    m.kernels->quantize(row, cols, data, token - panel.first, room, m.places);
    if (width == kWidePlaces && token == panel.first) clear_scales(data, cols, panel.count * m.places);
  }
  if (as_float) {
    const auto [index, first, count] = Panel(token, tokens, m.places, kPanelPlaces);
    float* panel = m.float_panels.as<float>() + size_t(first) * cols + (token - first);
    if (count == 1) memcpy(panel, row, size_t(cols) * sizeof(float));
    else
      for (int k = 0; k < cols; ++k) panel[size_t(k) * count] = row[k];
  }
}

// Rows of x, normed if `weight` is given, become the input of a matrix product with these matrices.
void prepare(pp_model& m, const float* x, size_t stride, int tokens, int cols, const float* weight,
             std::initializer_list<const Matrix*> users) {
  bool as_int = false, as_float = false;
  for (const Matrix* user : users) {
    if (user->empty()) continue;
    if (user->pack <= kPackBF16 || m.float_activations) as_float = true;
    else as_int = true;
  }
  const auto one = [&](int token, int thread) {
    const float* row = x + size_t(token) * stride;
    float* normed = m.normed.as<float>() + size_t(thread) * round_up(size_t(cols), 16);
    if (weight) {
      m.kernels->rms_norm(row, weight, normed, cols, m.config.rms_norm_eps);
      row = normed;
    }
    write_panels(m, row, cols, token, tokens, as_int, as_float);
  };
  // By panels: neighbours in one share cache lines.
  const int width = as_int ? panel_places(m, tokens) : kPanelPlaces, panels = num_panels(tokens, m.places, width);
  const auto of_panel = [&](int panel, int thread) {
    for (int t = panel_start(panel, tokens, panels); t < panel_start(panel + 1, tokens, panels); ++t) one(t, thread);
  };
  m.threads.run(panels, of_panel);
}

struct Product {
  const Matrix* matrix;
  float* out;
};

// The prepared input times every matrix. Tiles of all of them are one job.
void multiply(pp_model& m, std::initializer_list<Product> products, int tokens, size_t out_stride, int epilogue) {
  size_t bytes = 0;
  int tiles = 0;
  for (const Product& p : products) {
    if (p.matrix->empty()) continue;
    tiles += p.matrix->num_tiles();
    bytes += p.matrix->tiles.size();
  }
  const auto call_for = [&](const Product& p) {
    const Matrix& w = *p.matrix;
    LinearCall call;
    call.tiles = w.tiles.data();
    call.tile_bytes = w.bytes_of_tile();
    call.pack = w.pack;
    call.cols = w.cols;
    call.rows = w.rows;
    call.float_panels = w.pack <= kPackBF16 || m.float_activations;
    call.panels = call.float_panels ? m.float_panels.data() : m.int_panels.data();
    call.num_tokens = tokens;
    call.places = m.places;
    call.panel_places = call.float_panels ? kPanelPlaces : panel_places(m, tokens);
    call.panel_begin = 0;
    call.panel_end = num_panels(tokens, m.places, call.panel_places);
    call.out = p.out;
    call.out_stride = out_stride;
    call.epilogue = w.paired ? int(kSiluMul) : epilogue;
    return call;
  };
  const size_t work = bytes * size_t(tokens);
  if (work < kSerialBytes || m.threads.count() == 1) {
    for (const Product& p : products) {
      if (p.matrix->empty()) continue;
      LinearCall call = call_for(p);
      call.tile_begin = 0;
      call.tile_end = p.matrix->num_tiles();
      m.kernels->linear(call);
    }
    return;
  }
  // A thread reads fastest straight on: what it fetches ahead at the end of a tile is the beginning of
  // its next. So runs of tiles begin long and end short, each an eighth of a thread's share of what is left:
  // nobody waits long for the last. With many threads and tokens the tokens are divided too.
  const int threads = m.threads.count();
  int cuts = 1;
  const int fewest = num_panels(tokens, m.places, panel_places(m, tokens));
  while (tiles * cuts < 4 * threads && cuts * 4 <= fewest) cuts *= 2;
  int begins[kMaxRuns + 1], runs = 0;
  const size_t tile_work = bytes / size_t(tiles) * size_t(tokens);
  const int enough = 1 + int(kShortestRunBytes / (tile_work ? tile_work : 1));
  const int shortest = enough > tiles / kMaxRuns ? enough : tiles / kMaxRuns + 1;
  for (int at = 0; at < tiles; ++runs) {
    begins[runs] = at;
    const int left = tiles - at;
    int length = left / (8 * threads);
    length = length < shortest ? shortest : length;
    at += length < left ? length : left;
  }
  begins[runs] = tiles;
  m.threads.run(runs * cuts, [&](int item, int) {
    const int cut = item % cuts;
    int begin = begins[item / cuts], end = begins[item / cuts + 1];
    for (const Product& p : products) {
      if (p.matrix->empty()) continue;
      const int here = p.matrix->num_tiles();
      if (begin < here && end > 0) {
        LinearCall call = call_for(p);
        call.tile_begin = begin < 0 ? 0 : begin;
        call.tile_end = end < here ? end : here;
        const int panels = call.panel_end;
        call.panel_begin = panels * cut / cuts;
        call.panel_end = panels * (cut + 1) / cuts;
        m.kernels->linear(call);
      }
      begin -= here;
      end -= here;
    }
  });
}

// ---- attention -------------------------------------------------------------------------------------------

// A job is a block of query tokens of one segment against either one chunk (`parts` > 1: its result is
// added up later) or all chunks that the block sees.
struct Job {
  int segment, head, first, count;  // tokens of the segment
  int chunk_begin, chunk_end;
  size_t part;  // where the partial result lies, in floats; used when `split`
  bool split;
};
struct Join {
  int segment, head, first, count, chunks;
  size_t part;
};

size_t part_floats(const pp_model& m, int queries) { return size_t(queries) * size_t(m.padded_dim + 2); }

int first_visible(const pp_model& m, int position) {
  const int window = m.config.window;
  return window && position + 1 > window ? position + 1 - window : 0;
}

struct Step {
  std::vector<Segment> segments;
  std::vector<Job> jobs;
  std::vector<Join> joins;
  size_t work = 0;
  int tokens = 0;
};

// A block of a segment's tokens from `first` on, and the chunks that it sees.
struct Block {
  int count, chunk_begin, chunk_end;
  Block(const pp_model& m, const Segment& segment, int first) {
    count = segment.count - first < m.max_query_tokens ? segment.count - first : m.max_query_tokens;
    chunk_begin = first_visible(m, segment.start + first) / kChunk;
    chunk_end = (segment.start + first + count - 1) / kChunk + 1;
  }
};

void plan_attention(const pp_model& m, Step& step) {
  const pp_config& c = m.config;
  const int share = c.num_heads / c.num_kv_heads;
  size_t part = 0;
  for (int s = 0; s < int(step.segments.size()); ++s) {
    const Segment& segment = step.segments[size_t(s)];
    for (int first = 0; first < segment.count; first += m.max_query_tokens) {
      const Block b(m, segment, first);
      step.work += size_t(b.chunk_end - b.chunk_begin) * kChunk * size_t(b.count) * size_t(c.num_heads) * size_t(c.head_dim);
    }
    const Block only(m, segment, 0);
    const int chunks = only.chunk_end - only.chunk_begin;
    if (only.count < segment.count || chunks == 1) {
      // A head's blocks one after the other: its keys and values stay in the core's cache.
      for (int head = 0; head < c.num_kv_heads; ++head)
        for (int first = 0; first < segment.count; first += m.max_query_tokens) {
          const Block b(m, segment, first);
          step.jobs.push_back({s, head, first, b.count, b.chunk_begin, b.chunk_end, 0, false});
        }
      continue;
    }
    // In the order of the cache's memory, so that the end of one job fetches the beginning of the next.
    const size_t each = part_floats(m, only.count * share);
    for (int head = 0; head < c.num_kv_heads; ++head)
      step.joins.push_back({s, head, 0, only.count, chunks, part + size_t(head * chunks) * each});
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int head = 0; head < c.num_kv_heads; ++head)
        step.jobs.push_back({s, head, 0, only.count, only.chunk_begin + chunk, only.chunk_begin + chunk + 1,
                             part + size_t(head * chunks + chunk) * each, true});
    part += size_t(c.num_kv_heads * chunks) * each;
  }
}

size_t scratch_floats(const pp_model& m) {
  return round_up(attend_scratch_floats(m.padded_dim) + 2 * part_floats(m, kMaxQueries), 64);
}

void write_mixed(pp_model& m, const Segment& segment, int head, int first, int count, const float* o, const float* l) {
  const pp_config& c = m.config;
  const int share = c.num_heads / c.num_kv_heads;
  for (int t = 0; t < count; ++t) {
    for (int j = 0; j < share; ++j) {
      const int q = t * share + j;
      const float inverse = 1.0f / l[q];
      float* out = m.mixed.as<float>() + size_t(segment.first + first + t) * m.attention_width() +
                   size_t(head * share + j) * c.head_dim;
      for (int d = 0; d < c.head_dim; ++d) out[d] = o[size_t(q) * m.padded_dim + d] * inverse;
    }
  }
}

void attend_job(pp_model& m, const Step& step, const Job& job, int layer, int thread) {
  const pp_config& c = m.config;
  const int share = c.num_heads / c.num_kv_heads, dim = m.padded_dim;
  const Segment& segment = step.segments[size_t(job.segment)];
  const int queries = job.count * share;
  float* scratch = m.scratch.as<float>() + size_t(thread) * scratch_floats(m);
  float* running = scratch + attend_scratch_floats(dim);
  float* fresh = running + part_floats(m, kMaxQueries);
  bool begun = false;
  AttendCall call;
  call.cache_type = m.cache_type;
  call.head_dim = c.head_dim;
  call.padded_dim = dim;
  call.num_queries = queries;
  call.scale = 1.0f / std::sqrt(float(c.head_dim));
  call.scratch = scratch;
  for (int t = 0; t < job.count; ++t)
    for (int j = 0; j < share; ++j)
      call.queries[t * share + j] = m.qkv.as<float>() + size_t(segment.first + job.first + t) * m.qkv_rows() +
                                    size_t(job.head * share + j) * c.head_dim;
  for (int chunk = job.chunk_begin; chunk < job.chunk_end; ++chunk) {
    const int base = chunk * kChunk;
    const uint8_t* unit = segment.session->keys(layer, chunk, job.head);
    call.keys = unit;
    call.values = unit + m.key_bytes;
    call.key_scales = m.cache_type == PP_CACHE_Q8 ? reinterpret_cast<const float*>(unit + 2 * m.key_bytes) : nullptr;
    call.value_scales = call.key_scales ? call.key_scales + kChunk : nullptr;
    // Queries of the block that see nothing of this chunk are left out: a running result must not depend
    // on which other queries shared the block.
    AttendCall some = call;
    int which[kMaxQueries];
    some.num_queries = 0;
    for (int q = 0; q < queries; ++q) {
      const int position = segment.start + job.first + q / share;
      int begin = first_visible(m, position) - base, end = position + 1 - base;
      begin = begin < 0 ? 0 : begin;
      end = end > kChunk ? kChunk : end;
      if (begin >= end) continue;
      const int at = some.num_queries++;
      which[at] = q;
      some.queries[at] = call.queries[q];
      some.begin[at] = begin;
      some.end[at] = end;
    }
    float* target = job.split ? m.partial.as<float>() + job.part : !begun ? running : fresh;
    some.out = job.split || !begun ? target : fresh;
    // Layout of a part: outputs, then the largest scores, then the sums.
    float* largest = target + size_t(queries) * dim;
    float* total = largest + queries;
    if (!begun || job.split)
      for (int q = 0; q < queries; ++q) largest[q] = -1e30f, total[q] = 0.0f;
    begun = true;
    if (some.num_queries == 0) continue;
    if (some.num_queries == queries) {
      some.largest = largest;
      some.total = total;
      m.kernels->attend(some);
      if (target == fresh)
        for (int q = 0; q < queries; ++q)
          m.kernels->merge(running + size_t(queries) * dim + q, running + size_t(queries) * dim + queries + q,
                           running + size_t(q) * dim, largest[q], total[q], fresh + size_t(q) * dim, dim);
      continue;
    }
    // Only some queries take part: compute beside and put each where it belongs.
    some.out = fresh;
    some.largest = fresh + size_t(queries) * dim;
    some.total = some.largest + queries;
    if (target == running)
      for (int q = 0; q < queries; ++q) memset(running + size_t(q) * dim, 0, size_t(dim) * sizeof(float));
    m.kernels->attend(some);
    float* to = job.split ? target : running;
    for (int i = 0; i < some.num_queries; ++i) {
      const int q = which[i];
      float *tm = to + size_t(queries) * dim + q, *tl = tm + queries;
      if (*tl == 0.0f) {
        *tm = some.largest[i];
        *tl = some.total[i];
        memcpy(to + size_t(q) * dim, fresh + size_t(i) * dim, size_t(dim) * sizeof(float));
      } else {
        m.kernels->merge(tm, tl, to + size_t(q) * dim, some.largest[i], some.total[i], fresh + size_t(i) * dim, dim);
      }
    }
  }
  if (!job.split)
    write_mixed(m, segment, job.head, job.first, job.count, running, running + size_t(queries) * dim + queries);
}

void join_parts(pp_model& m, const Step& step, const Join& join, int thread) {
  const pp_config& c = m.config;
  const int share = c.num_heads / c.num_kv_heads, dim = m.padded_dim, queries = join.count * share;
  float* running = m.scratch.as<float>() + size_t(thread) * scratch_floats(m) + attend_scratch_floats(dim);
  float *largest = running + size_t(queries) * dim, *total = largest + queries;
  for (int q = 0; q < queries; ++q) total[q] = 0.0f;
  for (int chunk = 0; chunk < join.chunks; ++chunk) {
    const float* part = m.partial.as<float>() + join.part + size_t(chunk) * part_floats(m, queries);
    const float *m2 = part + size_t(queries) * dim, *l2 = m2 + queries;
    for (int q = 0; q < queries; ++q) {
      if (l2[q] == 0.0f) continue;
      if (total[q] == 0.0f) {
        largest[q] = m2[q];
        total[q] = l2[q];
        memcpy(running + size_t(q) * dim, part + size_t(q) * dim, size_t(dim) * sizeof(float));
      } else {
        m.kernels->merge(largest + q, total + q, running + size_t(q) * dim, m2[q], l2[q], part + size_t(q) * dim, dim);
      }
    }
  }
  write_mixed(m, step.segments[size_t(join.segment)], join.head, join.first, join.count, running, total);
}

// Rotate q and k of one token and put k and v into the cache.
void rotate_and_store(pp_model& m, const Segment& segment, int token, int layer) {
  const pp_config& c = m.config;
  const int t = token - segment.first, position = segment.start + t;
  float* row = m.qkv.as<float>() + size_t(token) * m.qkv_rows();
  const int half = c.head_dim / 2;
  const float* cosines = m.cosines.as<float>() + size_t(token) * half;
  const float* sines = m.sines.as<float>() + size_t(token) * half;
  for (int h = 0; h < c.num_heads + c.num_kv_heads; ++h)
    m.kernels->rope(row + size_t(h) * c.head_dim, cosines, sines, c.head_dim, c.rope_interleaved != 0);
  const float* keys = row + size_t(c.num_heads) * c.head_dim;
  const float* values = keys + size_t(c.num_kv_heads) * c.head_dim;
  for (int h = 0; h < c.num_kv_heads; ++h) {
    uint8_t* unit = segment.session->keys(layer, position / kChunk, h);
    auto* scales = reinterpret_cast<float*>(unit + 2 * m.key_bytes);
    m.kernels->store_kv(m.cache_type, keys + size_t(h) * c.head_dim, values + size_t(h) * c.head_dim, c.head_dim,
                        m.padded_dim, position % kChunk, unit, unit + m.key_bytes, scales, scales + kChunk);
  }
}

bool grow_working(pp_model& m, int tokens) {
  if (tokens <= m.working_tokens) return true;
  const pp_config& c = m.config;
  const size_t n = size_t(tokens), threads = size_t(m.threads.count());
  const size_t widest = size_t(c.intermediate_size > c.hidden_size ? c.intermediate_size : c.hidden_size);
  const size_t wide = widest > size_t(m.attention_width()) ? widest : size_t(m.attention_width());
  // Wide panels have room for all their places.
  const size_t int_places = m.kernels->wide_from ? size_t(num_panels(tokens, m.places, kWidePlaces)) * kWidePlaces : n * size_t(m.places);
  const size_t head_rows = n < 32 ? n : 32;
  m.working_tokens = 0;
  // A little slack behind every buffer: kernels read and write 16 numbers at a time.
  if (!m.x.allocate(n * c.hidden_size * 4 + 256, false) || !m.qkv.allocate(n * m.qkv_rows() * 4 + 256, false) ||
      !m.mixed.allocate(n * m.attention_width() * 4 + 256, false) ||
      !m.hidden.allocate(n * c.intermediate_size * 4 + 256, false) ||
      !m.normed.allocate(threads * round_up(wide, 16) * 4 + 256, false) ||
      !m.int_panels.allocate(int_places * (wide / kGroup + 1) * kRecordBytes + 256, false) ||
      !m.float_panels.allocate(n * wide * 4 + 256, false) ||
      !m.logits.allocate(head_rows * round_up(size_t(c.vocab_size), 32) * 4 + 256, false) ||
      !m.cosines.allocate(n * c.head_dim * 2 + 256, false) || !m.sines.allocate(n * c.head_dim * 2 + 256, false) ||
      !m.scratch.allocate(threads * scratch_floats(m) * 4, false))
    return false;
  m.working_tokens = tokens;
  return true;
}

bool layers_forward(pp_model& m, Step& step, const int32_t* ids) {
  const pp_config& c = m.config;
  const int n = step.tokens, hidden = c.hidden_size, half = c.head_dim / 2;
  if (!grow_working(m, n)) return false;
  plan_attention(m, step);
  size_t parts = 0;
  for (const Job& job : step.jobs)
    if (job.split) parts += part_floats(m, job.count * (c.num_heads / c.num_kv_heads));
  if (parts > m.partial_floats) {
    m.partial_floats = 0;
    if (!m.partial.allocate(parts * 4, false)) return false;
    m.partial_floats = parts;
  }
  float* x = m.x.as<float>();
  std::vector<int> owner(size_t(n), 0);
  for (int s = 0; s < int(step.segments.size()); ++s)
    for (int t = 0; t < step.segments[size_t(s)].count; ++t) owner[size_t(step.segments[size_t(s)].first + t)] = s;
  m.threads.run(n, [&](int t, int) {
    unpack_row(m.embed, ids[t], x + size_t(t) * hidden);
    const Segment& segment = step.segments[size_t(owner[size_t(t)])];
    const int set = segment.session->rope_set;
    const float position = float(segment.start + t - segment.first);
    for (int i = 0; i < half; ++i) {
      // The angle is a float32 product, as in the reference the models were trained with.
      const double angle = double(position * m.inv_freq[set][size_t(i)]);
      m.cosines.as<float>()[size_t(t) * half + i] = float(std::cos(angle)) * c.rope_magnitude[set];
      m.sines.as<float>()[size_t(t) * half + i] = float(std::sin(angle)) * c.rope_magnitude[set];
    }
  });
  for (int l = 0; l < c.num_layers; ++l) {
    const Layer& layer = m.layers[size_t(l)];
    prepare(m, x, size_t(hidden), n, hidden, layer.attention_norm.as<float>(), {&layer.qkv[0], &layer.qkv[1], &layer.qkv[2]});
    float* qkv = m.qkv.as<float>();
    const int width = m.attention_width(), kv_width = c.num_kv_heads * c.head_dim;
    multiply(m, {{&layer.qkv[0], qkv}, {&layer.qkv[1], qkv + width}, {&layer.qkv[2], qkv + width + kv_width}}, n,
             size_t(m.qkv_rows()), kStore);
    if (n < 4) {
      for (int t = 0; t < n; ++t) rotate_and_store(m, step.segments[size_t(owner[size_t(t)])], t, l);
    } else {
      // Sixteen tokens at a time: they share the cache lines of the keys.
      m.threads.run((n + 15) / 16, [&](int block, int) {
        for (int t = 16 * block; t < 16 * block + 16 && t < n; ++t)
          rotate_and_store(m, step.segments[size_t(owner[size_t(t)])], t, l);
      });
    }
    const bool serial = step.work < kSerialBytes * 4;
    if (serial) {
      for (const Job& job : step.jobs) attend_job(m, step, job, l, 0);
      for (const Join& join : step.joins) join_parts(m, step, join, 0);
    } else {
      // Neighbours in memory go to one thread, at least 8 items for each.
      const int jobs = int(step.jobs.size());
      int run = step.joins.empty() ? 1 : jobs / (8 * m.threads.count());
      run = run < 1 ? 1 : run > 8 ? 8 : run;
      m.threads.run((jobs + run - 1) / run, [&](int item, int thread) {
        for (int i = item * run; i < item * run + run && i < jobs; ++i) attend_job(m, step, step.jobs[size_t(i)], l, thread);
      });
      m.threads.run(int(step.joins.size()), [&](int i, int thread) { join_parts(m, step, step.joins[size_t(i)], thread); });
    }
    prepare(m, m.mixed.as<float>(), size_t(width), n, width, nullptr, {&layer.output});
    multiply(m, {{&layer.output, x}}, n, size_t(hidden), kAdd);
    prepare(m, x, size_t(hidden), n, hidden, layer.mlp_norm.as<float>(), {&layer.gate_up});
    multiply(m, {{&layer.gate_up, m.hidden.as<float>()}}, n, size_t(c.intermediate_size), kSiluMul);
    prepare(m, m.hidden.as<float>(), size_t(c.intermediate_size), n, c.intermediate_size, nullptr, {&layer.down});
    multiply(m, {{&layer.down, x}}, n, size_t(hidden), kAdd);
  }
  return true;
}

struct Row {
  int token;
  float* logits;
};

// The head for some tokens of the step.
bool head_forward(pp_model& m, const std::vector<Row>& rows) {
  const pp_config& c = m.config;
  const Matrix& head = c.tied_head ? m.embed : m.head;
  const int hidden = c.hidden_size;
  const size_t stride = round_up(size_t(c.vocab_size), 32);
  for (size_t at = 0; at < rows.size(); at += 32) {
    const int n = int(rows.size() - at < 32 ? rows.size() - at : 32);
    // Gather the rows at the front of `mixed`-sized memory: x itself must stay for the rows to come.
    const bool as_float = head.pack <= kPackBF16 || m.float_activations;
    m.threads.run(n, [&](int i, int thread) {
      float* normed = m.normed.as<float>() + size_t(thread) * round_up(size_t(hidden), 16);
      m.kernels->rms_norm(m.x.as<float>() + size_t(rows[at + size_t(i)].token) * hidden, m.norm.as<float>(), normed,
                          hidden, c.rms_norm_eps);
      write_panels(m, normed, hidden, i, n, !as_float, as_float);
    });
    multiply(m, {{&head, m.logits.as<float>()}}, n, stride, kStore);
    std::atomic<bool> finite{true};
    m.threads.run(n, [&](int i, int) {
      const float* from = m.logits.as<float>() + size_t(i) * stride;
      float* to = rows[at + size_t(i)].logits;
      uint32_t bad = 0;
      for (int v = 0; v < c.vocab_size; ++v) {
        uint32_t bits;
        memcpy(&bits, from + v, 4);
        bad |= uint32_t((bits & 0x7f800000u) == 0x7f800000u);
        to[v] = from[v];
      }
      if (bad) finite.store(false, std::memory_order_relaxed);
    });
    if (!finite.load()) return fail("the model computed logits that are not finite");
  }
  return true;
}

}  // namespace

bool model_forward(pp_model& m, const pp_work* work, int num_work) {
  const pp_config& c = m.config;
  if (!m.finished) return fail("the model is not complete yet");
  // Everything that can be wrong is found before any session changes.
  for (int i = 0; i < num_work; ++i) {
    const pp_work& w = work[i];
    if (!w.session || w.session->model != &m) return fail("item %d: the session belongs to another model", i);
    if (w.num_ids < 1) return fail("item %d: no token ids", i);
    if (w.num_ids > w.session->capacity - w.session->length)
      return fail("%d tokens in the session and %d more exceed its capacity of %d", w.session->length, w.num_ids,
                  w.session->capacity);
    if (w.want != PP_WANT_NONE && !w.logits) return fail("item %d: no room for logits", i);
    for (int j = 0; j < i; ++j)
      if (work[j].session == w.session) return fail("item %d: the same session twice in one batch", i);
    for (int t = 0; t < w.num_ids; ++t)
      if (w.ids[t] < 0 || w.ids[t] >= c.vocab_size)
        return fail("token id %d is outside the vocabulary of %d", w.ids[t], c.vocab_size);
  }
  std::vector<int> before(size_t(num_work), 0), done(size_t(num_work), 0);
  for (int i = 0; i < num_work; ++i) before[size_t(i)] = work[i].session->length;
  bool good = true;
  int item = 0;
  std::vector<int32_t> ids;
  std::vector<Row> rows;
  while (good && item < num_work) {
    Step step;
    ids.clear();
    rows.clear();
    while (item < num_work && step.tokens < m.max_batch_tokens) {
      const pp_work& w = work[item];
      int& at = done[size_t(item)];
      const int room = m.max_batch_tokens - step.tokens, left = w.num_ids - at;
      const int count = left < room ? left : room;
      step.segments.push_back({w.session, step.tokens, count, w.session->length});
      for (int t = 0; t < count; ++t) {
        ids.push_back(w.ids[at + t]);
        const bool last = at + t + 1 == w.num_ids;
        if (w.want == PP_WANT_ALL) rows.push_back({step.tokens + t, w.logits + size_t(at + t) * c.vocab_size});
        else if (w.want == PP_WANT_LAST && last) rows.push_back({step.tokens + t, w.logits});
      }
      step.tokens += count;
      at += count;
      if (at < w.num_ids) break;
      ++item;
    }
    good = layers_forward(m, step, ids.data()) && head_forward(m, rows);
    for (const Segment& segment : step.segments) segment.session->length += segment.count;
  }
  if (!good)
    for (int i = 0; i < num_work; ++i) work[i].session->length = before[size_t(i)];
  return good;
}

}  // namespace pp
