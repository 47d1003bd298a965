// Every kernel set that this machine has against the plain one, bit for bit; `--bench` times them too.
//
//     pocketphi_kernels_test [--bench] [--kernels NAME] [--type NAME]
//
// Exit code 0 when all agree. Times are of the calling thread's own CPU time, so that a busy machine
// disturbs them little.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

#include "../src/model.h"
#include "../src/sampling.h"

using namespace pp;

namespace {

uint64_t state = 88172645463325252ull;
uint32_t random32() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return uint32_t(state >> 16);
}
float uniform() { return float(random32() % 20001) / 10000.0f - 1.0f; }

int failures = 0;
void check(bool good, const char* kernels, const char* what, int a = 0, int b = 0) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s: %s (%d, %d) differs from generic\n", kernels, what, a, b);
}

const int types[] = {PP_F32, PP_F16, PP_BF16, PP_Q8_0, PP_Q4_0, PP_Q4_1, PP_Q4_K, PP_Q5_K, PP_Q6_K};

// Random bytes with sensible scales are a valid tensor of any type.
std::vector<uint8_t> random_rows(int type, int rows, int cols) {
  const TypeInfo& info = *type_info(type);
  const size_t blocks = size_t(rows) * size_t(cols / info.block_weights);
  std::vector<uint8_t> data(blocks * size_t(info.block_bytes));
  for (auto& byte : data) byte = uint8_t(random32());
  for (size_t b = 0; b < blocks; ++b) {
    uint8_t* p = data.data() + b * size_t(info.block_bytes);
    const uint16_t d = float_to_half(0.01f + 0.01f * std::fabs(uniform())), m = float_to_half(uniform() * 0.02f);
    const float f = uniform();
    const uint16_t h = float_to_half(f);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t bf = uint16_t(bits >> 16);
    switch (type) {
      case PP_F32: std::memcpy(p, &f, 4); break;
      case PP_F16: std::memcpy(p, &h, 2); break;
      case PP_BF16: std::memcpy(p, &bf, 2); break;
      case PP_Q6_K: std::memcpy(p + 208, &d, 2); break;
      case PP_Q8_0:
      case PP_Q4_0: std::memcpy(p, &d, 2); break;
      default:
        std::memcpy(p, &d, 2);
        std::memcpy(p + 2, &m, 2);
    }
  }
  return data;
}

void fill(Matrix& matrix, int type, int rows, int cols, bool paired) {
  const auto data = random_rows(type, rows, cols);
  const TypeInfo& info = *type_info(type);
  const size_t row_bytes = data.size() / size_t(rows);
  matrix.allocate(info.pack, paired ? rows / 2 : rows, cols, paired);
  std::vector<uint8_t> scratch(size_t(cols) * 8 + 64);
  for (int r = 0; r < rows; ++r) {
    const int row = paired ? r % (rows / 2) : r, half = paired ? r / (rows / 2) : 0, width = matrix.width();
    uint8_t* tile = matrix.tiles.data() + size_t(row / width) * matrix.bytes_of_tile();
    pack_row(type, type, data.data() + size_t(r) * row_bytes, cols, tile, row % width + 16 * half, scratch.data());
  }
}

struct Panels {
  std::vector<uint8_t> ints;
  std::vector<float> floats;
  int places;  // of a panel of ints
};
Panels make_panels(const Kernels& k, const std::vector<float>& x, int tokens, int cols, int places = 1) {
  Panels out;
  out.places = k.wide_from && tokens * places >= k.wide_from ? kWidePlaces : kPanelPlaces;
  out.ints.resize(panel_offset(num_panels(tokens, places, out.places), tokens, places, out.places, cols));
  out.floats.resize(size_t(tokens) * size_t(cols));
  for (const bool as_float : {false, true}) {
    const int panels = num_panels(tokens, places, as_float ? kPanelPlaces : out.places);
    for (int b = 0; b < panels; ++b) {
      const int first = panel_start(b, tokens, panels), count = panel_start(b + 1, tokens, panels) - first;
      for (int t = 0; t < count; ++t) {
        const float* row = x.data() + size_t(first + t) * size_t(cols);
        if (as_float)
          for (int i = 0; i < cols; ++i) out.floats[size_t(first) * cols + size_t(i) * count + t] = row[i];
        else if (cols % kGroup == 0)
          k.quantize(row, cols, out.ints.data() + panel_offset(b, first, places, out.places, cols), t,
                     panel_room(count, places, out.places), places);
      }
    }
  }
  return out;
}

LinearCall linear_call(const Matrix& w, const Panels& panels, int tokens, bool as_float, float* out, size_t stride,
                       int places = 1) {
  LinearCall call;
  call.tiles = w.tiles.data();
  call.tile_bytes = w.bytes_of_tile();
  call.pack = w.pack;
  call.cols = w.cols;
  call.rows = w.rows;
  call.tile_begin = 0;
  call.tile_end = w.num_tiles();
  call.float_panels = as_float || w.pack <= kPackBF16;
  call.panels = call.float_panels ? reinterpret_cast<const uint8_t*>(panels.floats.data()) : panels.ints.data();
  call.num_tokens = tokens;
  call.places = places;
  call.panel_places = call.float_panels ? kPanelPlaces : panels.places;
  call.panel_begin = 0;
  call.panel_end = num_panels(tokens, places, call.panel_places);
  call.out = out;
  call.out_stride = stride;
  call.epilogue = w.paired ? kSiluMul : kStore;
  return call;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

void test_linear(const Kernels& fast) {
  for (const int type : types) {
    const char* name = type_info(type)->name;
    for (const bool paired : {false, true}) {
      const int cols = type == PP_Q4_0 ? 608 : 768, rows = paired ? 96 : 75;  // 75: a last tile that is not full
      Matrix w;
      fill(w, type, rows, cols, paired);
      for (const int tokens : {1, 2, 3, 4, 5, 6, 7, 13, 16, 33, 270}) {
        if (tokens == 270 && (type != PP_Q4_0 || paired)) continue;  // more panels than AMX holds the sums of

        std::vector<float> x(size_t(tokens) * cols);
        for (auto& v : x) v = uniform() * 3;
        if (tokens == 2) std::memset(x.data(), 0, 64 * sizeof(float));  // a group of zeros
        for (const int places : {1, 2}) {
          const Panels plain = make_panels(kernels_generic, x, tokens, cols, places);
          const Panels quick = make_panels(fast, x, tokens, cols, places);
          if (plain.places == quick.places) check(plain.ints == quick.ints, fast.name, "quantize", tokens, places);
          for (const bool as_float : {false, true}) {
            const size_t stride = 128;
            std::vector<float> a(stride * size_t(tokens), 1.0f), b(a);
            kernels_generic.linear(linear_call(w, plain, tokens, as_float, a.data(), stride, places));
            fast.linear(linear_call(w, quick, tokens, as_float, b.data(), stride, places));
            check(same(a, b), fast.name, name, tokens, as_float);
            // Alone or among others, a token's result is the same.
            if (tokens == 7) {
              const std::vector<float> one(x.begin() + 3 * cols, x.begin() + 4 * cols);
              const Panels single = make_panels(fast, one, 1, cols, places);
              std::vector<float> c(stride, 1.0f);
              fast.linear(linear_call(w, single, 1, as_float, c.data(), stride, places));
              check(std::memcmp(c.data(), b.data() + 3 * stride, stride * 4) == 0, fast.name, "one token among many", type);
            }
          }
        }
      }
    }
  }
}

void test_rows(const Kernels& fast) {
  for (const int n : {16, 48, 50, 192, 3072}) {
    std::vector<float> x(size_t(n) + 16), w(x), a(x), b(x);
    for (auto& v : x) v = uniform() * 5;
    for (auto& v : w) v = uniform();
    kernels_generic.rms_norm(x.data(), w.data(), a.data(), n, 1e-5f);
    fast.rms_norm(x.data(), w.data(), b.data(), n, 1e-5f);
    check(same(a, b), fast.name, "rms_norm", n);
  }
  for (const int dim : {32, 96, 20}) {
    for (const bool interleaved : {false, true}) {
      std::vector<float> a(128), c(64), s(64);
      for (int i = 0; i < 64; ++i) c[size_t(i)] = std::cos(float(i)), s[size_t(i)] = std::sin(float(i));
      for (auto& v : a) v = uniform();
      std::vector<float> b(a);
      kernels_generic.rope(a.data(), c.data(), s.data(), dim, interleaved);
      fast.rope(b.data(), c.data(), s.data(), dim, interleaved);
      check(same(a, b), fast.name, "rope", dim, interleaved);
    }
  }
}

void test_attention(const Kernels& fast) {
  for (const int dim : {32, 96, 128, 20}) {
    const int padded = int(round_up(size_t(dim), 16));
    for (const int cache : {PP_CACHE_F32, PP_CACHE_F16, PP_CACHE_Q8}) {
      const size_t bytes = size_t(kChunk) * padded * 4;
      std::vector<uint8_t> keys(bytes), values(bytes), keys2(bytes), values2(bytes);
      std::vector<float> ks(kChunk), vs(kChunk), ks2(kChunk), vs2(kChunk), row(256);
      for (int p = 0; p < kChunk; ++p) {
        for (auto& v : row) v = uniform() * 2;
        kernels_generic.store_kv(cache, row.data(), row.data() + 128, dim, padded, p, keys.data(), values.data(), ks.data(), vs.data());
        fast.store_kv(cache, row.data(), row.data() + 128, dim, padded, p, keys2.data(), values2.data(), ks2.data(), vs2.data());
      }
      check(keys == keys2 && values == values2 && same(ks, ks2) && same(vs, vs2), fast.name, "store_kv", dim, cache);
      for (const int queries : {1, 2, 3, 4, 7, 16, 29}) {
        std::vector<float> q(size_t(queries) * 128), scratch(attend_scratch_floats(padded));
        for (auto& v : q) v = uniform() * 3;
        std::vector<float> out[2], largest[2], total[2];
        for (int k = 0; k < 2; ++k) {
          AttendCall call;
          call.cache_type = cache;
          call.head_dim = dim;
          call.padded_dim = padded;
          call.keys = keys.data();
          call.values = values.data();
          call.key_scales = cache == PP_CACHE_Q8 ? ks.data() : nullptr;
          call.value_scales = cache == PP_CACHE_Q8 ? vs.data() : nullptr;
          call.num_queries = queries;
          for (int j = 0; j < queries; ++j) {
            call.queries[j] = q.data() + size_t(j) * 128;
            call.begin[j] = 3 + j;
            call.end[j] = 180 + j;
          }
          call.scale = 0.1f;
          call.scratch = scratch.data();
          out[k].resize(size_t(queries) * padded);
          largest[k].resize(size_t(queries));
          total[k].resize(size_t(queries));
          call.out = out[k].data();
          call.largest = largest[k].data();
          call.total = total[k].data();
          (k ? fast : kernels_generic).attend(call);
        }
        check(same(out[0], out[1]) && same(largest[0], largest[1]) && same(total[0], total[1]), fast.name, "attend", dim, queries);
        float m[2] = {0.5f, 0.5f}, l[2] = {2.0f, 2.0f};
        std::vector<float> o(size_t(padded), 0.25f), o2(o);
        kernels_generic.merge(&m[0], &l[0], o.data(), largest[0][0], total[0][0], out[0].data(), padded);
        fast.merge(&m[1], &l[1], o2.data(), largest[0][0], total[0][0], out[0].data(), padded);
        check(same(o, o2) && m[0] == m[1] && l[0] == l[1], fast.name, "merge", dim);
      }
    }
  }
}

double cpu_s() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

void test_vocabulary(const VocabularyLoops& fast) {
  const VocabularyLoops& plain = *vocabulary_loops(0);
  for (int size : {1, 7, 64, 65, 1000, 32064}) {
    std::vector<float> values(static_cast<size_t>(size));
    for (int kind = 0; kind < 6; ++kind) {
      for (float& v : values) v = kind == 1 ? std::round(uniform() * 4) : kind == 2 ? uniform() * 3e38f : uniform() * 20;
      float& one = values[size_t(random32()) % values.size()];
      if (kind == 3) one = -INFINITY;
      if (kind == 4) one = NAN;
      if (kind == 5) one = -NAN;
      for (bool minus : {false, true}) {
        const VocabularyScan a = plain.scan(values.data(), size, minus), b = fast.scan(values.data(), size, minus);
        check(std::memcmp(&a, &b, sizeof a) == 0, fast.name, "scan of a vocabulary", size, kind);
      }
      if (kind > 3) continue;
      const double largest = double(plain.scan(values.data(), size, true).largest);
      for (double inverse : {1.0, 0.37, 1e4, 1.7976931348623157e308}) {
        std::vector<uint64_t> a(values.size()), b(values.size());
        const uint64_t sum_a = plain.weights(values.data(), size, largest, inverse, a.data());
        const uint64_t sum_b = fast.weights(values.data(), size, largest, inverse, b.data());
        check(sum_a == sum_b && a == b, fast.name, "weights", size, kind);
      }
      const double a = plain.exponentials(values.data(), size, largest), b = fast.exponentials(values.data(), size, largest);
      check(a == b, fast.name, "sum of exponentials", size, kind);
    }
  }
}

// Reading alone, in huge pages as weights have them: what one token's time is to be compared with.
void bench_read(const Kernels& k) {
  Pages memory;
  const size_t bytes = size_t(512) << 20;
  if (!memory.allocate(bytes, true)) return;
  std::memset(memory.data(), 1, bytes);
  double best = 1e9;
  for (int round = 0; round < 3; ++round) {
    const double begin = cpu_s();
    k.read_probe(memory.data(), bytes);
    const double seconds = cpu_s() - begin;
    best = seconds < best ? seconds : best;
  }
  std::printf("%-10s reading %6.1f GB/s\n", k.name, double(bytes) / best * 1e-9);
}

void bench(const Kernels& k, const char* only) {
  bench_read(k);
  double begin = cpu_s();
  int64_t sum = k.int8_probe(1000000);
  const double macs = 1e6 * 6 * 8 * 64 / (cpu_s() - begin);
  std::printf("%-10s inner loop %7.1f GMAC/s per thread (%d)\n", k.name, macs * 1e-9, int(sum & 1));
  // 256 MB of weights: nothing stays in a cache between two passes.
  for (const int type : types) {
    const int cols = 3072;
    const TypeInfo& info = *type_info(type);
    if (only && std::strcmp(only, info.name) != 0) continue;
    const size_t tile = tile_bytes(info.pack, cols);
    Matrix one, w;
    fill(one, type, 32, cols, false);
    const int tiles = int((size_t(192) << 20) / tile);
    w.allocate(info.pack, tiles * 32, cols, false);
    for (int i = 0; i < tiles; ++i) std::memcpy(w.tiles.data() + size_t(i) * tile, one.tiles.data(), tile);
    for (const int tokens : {1, 2, 4, 8, 16, 32, 256, 512}) {
      const int used = tokens > 8 ? tiles / 16 : tiles;
      std::vector<float> x(size_t(tokens) * cols), out(size_t(tokens) * w.rows);
      for (auto& v : x) v = uniform();
      const Panels panels = make_panels(k, x, tokens, cols);
      double best = 1e9;
      for (int round = 0; round < 3; ++round) {
        LinearCall call = linear_call(w, panels, tokens, false, out.data(), size_t(w.rows));
        call.tile_end = used;
        begin = cpu_s();
        k.linear(call);
        const double seconds = cpu_s() - begin;
        best = seconds < best ? seconds : best;
      }
      std::printf("%-10s %-5s tokens %3d  %6.1f GB/s  %7.1f GMAC/s\n", k.name, info.name, tokens,
                  double(tile) * used / best * 1e-9, double(used) * 32 * cols * tokens / best * 1e-9);
    }
  }
  bench_read(k);
  const int dim = 96, units = 4096;
  for (const int cache : {PP_CACHE_F16, PP_CACHE_Q8}) {
    const size_t element = cache == PP_CACHE_F16 ? 2 : 1, half = size_t(kChunk) * dim * element, unit = 2 * half + 2048;
    Pages memory;
    if (!memory.allocate(unit * units, true)) return;
    std::memset(memory.data(), 1, unit * units);
    // Scales of ordinary size: products with smaller ones are denormal numbers, slow on some processors.
    if (cache == PP_CACHE_Q8)
      for (int c = 0; c < units; ++c)
        for (int i = 0; i < 2 * kChunk; ++i) reinterpret_cast<float*>(memory.data() + unit * size_t(c) + 2 * half)[i] = 0.01f;
    std::vector<float> q(32 * dim, 0.01f), scratch(attend_scratch_floats(dim)), out(32 * dim), m(32), l(32);
    for (const int queries : {1, 4, 16, 32}) {
      const int used = queries == 1 ? units : units / 4;
      double best = 1e9;
      for (int round = 0; round < 3; ++round) {
        begin = cpu_s();
        for (int c = 0; c < used; ++c) {
          AttendCall call;
          call.cache_type = cache;
          call.head_dim = call.padded_dim = dim;
          call.keys = memory.data() + unit * size_t(c);
          call.values = call.keys + half;
          call.key_scales = cache == PP_CACHE_Q8 ? reinterpret_cast<const float*>(call.keys + 2 * half) : nullptr;
          call.value_scales = call.key_scales ? call.key_scales + kChunk : nullptr;
          call.num_queries = queries;
          for (int j = 0; j < queries; ++j) call.queries[j] = q.data() + j * dim, call.begin[j] = 0, call.end[j] = kChunk;
          call.scale = 0.1f;
          call.scratch = scratch.data();
          call.out = out.data();
          call.largest = m.data();
          call.total = l.data();
          k.attend(call);
        }
        const double seconds = cpu_s() - begin;
        best = seconds < best ? seconds : best;
      }
      std::printf("%-10s attention %s cache, %2d queries  %6.1f GB/s  %6.1f GMAC/s\n", k.name, cache == PP_CACHE_F16 ? "f16" : "q8 ",
                  queries, double(unit) * used / best * 1e-9, 2.0 * used * kChunk * dim * queries / best * 1e-9);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool timed = false;
  const char *only = nullptr, *type = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--bench") == 0) timed = true;
    else if (std::strcmp(argv[i], "--kernels") == 0 && i + 1 < argc) only = argv[++i];
    else if (std::strcmp(argv[i], "--type") == 0 && i + 1 < argc) type = argv[++i];
  }
  std::printf("kernels available: %s\n", kernels_available());
  char names[128];
  std::snprintf(names, sizeof names, "%s", kernels_available());
  for (char* name = std::strtok(names, ","); name; name = std::strtok(nullptr, ",")) {
    if (only && std::strcmp(only, name) != 0) continue;
    const Kernels& k = *select_kernels(name);
    test_linear(k);
    test_rows(k);
    test_attention(k);
    std::printf("%s: %s\n", name, failures ? "FAILED" : "equal to generic, bit for bit");
    if (timed && k.name != kernels_generic.name) bench(k, type);
  }
  for (int i = 1; vocabulary_loops(i); ++i) {
    test_vocabulary(*vocabulary_loops(i));
    std::printf("sampling, %s: %s\n", vocabulary_loops(i)->name, failures ? "FAILED" : "equal to generic, bit for bit");
  }
  return failures ? 1 : 0;
}
