// Prints what one instruction set computes, to be compared with what another does, here or under an emulator.
//
//   native_check LIBRARY      one line per case: its name, a tab, its numbers
//
// Compiled with the flags of an instruction set, it calls that set's lanes itself, and everything above them through the C
// interface of LIBRARY. Inputs are made from integers alone, so that they are the same everywhere.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "interface.h"
#include "lanes.h"

namespace lanes = INFOPT_ISA;
#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

static uint32_t state = 1;
static uint32_t bits() { return state = state * 1664525u + 1013904223u, state >> 8; }  // 24 of them
static float number() { return float(int32_t(bits()) - (1 << 23)) / float(1 << 23); }   // [−1, 1)

static void print(const std::string& name, const float* numbers, size_t count) {
    printf("%s\t", name.c_str());
    for (size_t i = 0; i < count; i++) printf("%.9g ", double(numbers[i]));
    printf("\n");
}

static uint16_t upper_half(float x) {
    uint32_t whole;
    memcpy(&whole, &x, 4);
    return uint16_t(whole >> 16);
}

template <class Function>
static void each(const char* name, const std::vector<float>& inputs, Function function) {
    std::vector<float> out(inputs.size());
    for (size_t i = 0; i < inputs.size(); i += 16) lanes::store(&out[i], function(lanes::load(&inputs[i])));
    print(std::string("lanes ") + name, out.data(), out.size());
}

static void check_functions() {
    std::vector<float> wide(256), halves(256);
    for (auto& x : wide) x = number() * 20;
    const float infinity = std::numeric_limits<float>::infinity();
    const float ends[] = {0, -0.0f, -86, 87, -200, 200, 1e-30f, std::numeric_limits<float>::quiet_NaN()};
    std::copy(std::begin(ends), std::end(ends), wide.begin());
    // Ties, the smallest normal and subnormal halves, and what a half cannot hold
    const float special[] = {1 + 1 / 2048.0f, 1 + 3 / 2048.0f, 6.1035156e-5f, 6.0e-5f, 5.96e-8f, 2.98e-8f, 1e-9f, 65504, 65519, 65520,
                             1e9f,            infinity,        -infinity,     -0.0f,   -6e-8f,   ends[7]};
    for (auto& x : halves) x = number() * float(1 << bits() % 16) / 256;
    std::copy(std::begin(special), std::end(special), halves.begin());
    each("exp", wide, [](lanes::F x) { return lanes::exp(x); });
    each("silu", wide, [](lanes::F x) { return lanes::silu(x); });
    each("gelu", wide, [](lanes::F x) { return lanes::gelu_tanh(x); });
    each("half", halves, [](lanes::F x) {
        uint16_t stored[16];
        lanes::store_half(stored, x);
        return lanes::load_half(stored);
    });
    each("abs", halves, [](lanes::F x) { return lanes::abs(x); });
    each("bounds", std::vector<float>(wide.begin() + 16, wide.end()),
         [](lanes::F x) { return lanes::max(lanes::set1(-3), lanes::min(lanes::set1(4), x)); });
    each("across", std::vector<float>(wide.begin() + 16, wide.end()),
         [](lanes::F x) { return lanes::fma(lanes::set1(lanes::sum(x)), lanes::set1(lanes::largest(x)), lanes::div(x, x)); });
}

static void check_bytes() {
    uint16_t pairs[32];
    for (auto& each : pairs) each = upper_half(number());
    float out[64];
    lanes::F first, second;
    lanes::load_bf16_pairs(pairs, first, second);
    lanes::store(out, first);
    lanes::store(out + 16, second);
    lanes::store(out + 32, lanes::load_bf16(pairs));
    print("lanes bfloat16", out, 48);
    float values[16];
    int8_t rounded[16];
    for (int i = 0; i < 16; i++) values[i] = i < 8 ? float(i) - 3.5f : number() * 127;  // halves go to even
    const int32_t total = lanes::store_rounded(rounded, lanes::load(values));
    for (int i = 0; i < 16; i++) out[i] = rounded[i];
    out[16] = float(total);
    print("lanes rounded", out, 17);
    // The extremes of what the kernels hand over: any byte as a weight, inputs within ±127 and their sum in the offset.
    uint8_t weights[64];
    int8_t inputs[4] = {127, -127, -127, 127};
    for (int i = 0; i < 64; i++) weights[i] = i < 16 ? (i % 2 ? 0 : 255) : uint8_t(bits());
    for (int round = 0; round < 3; round++) {
        const lanes::Bytes loaded = lanes::load_bytes(weights);
        const int32_t offset = -128 * (inputs[0] + inputs[1] + inputs[2] + inputs[3]);
        lanes::Dots eight, four, other;
        eight.start8(offset);
        eight.add8(loaded, inputs);
        four.start4(offset);
        four.add4(lanes::low_halves(loaded), inputs);
        other.start4(0);
        other.add4(lanes::high_halves(loaded), inputs);
        lanes::store(out, eight.total());
        lanes::store(out + 16, four.total());
        lanes::store(out + 32, other.total());
        print("lanes dots " + std::to_string(round), out, 48);
        for (auto& x : inputs) x = int8_t(int32_t(bits() % 255) - 127);
    }
}

struct Library {
    explicit Library(const char* path) : handle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (!handle) {
            fprintf(stderr, "%s\n", dlerror());
            exit(1);
        }
        find(isa, "infopt_isa");
        find(page_bytes, "infopt_page_bytes");
        find(open, "infopt_open");
        find(close, "infopt_close");
        find(step, "infopt_step");
        find(multiply, "infopt_multiply");
    }
    template <class Function>
    void find(Function*& function, const char* name) {
        function = (Function*)dlsym(handle, name);
    }

    void* handle;
    decltype(infopt_isa)* isa;
    decltype(infopt_page_bytes)* page_bytes;
    decltype(infopt_open)* open;
    decltype(infopt_close)* close;
    decltype(infopt_step)* step;
    decltype(infopt_multiply)* multiply;
};

static int up(int n, int to) { return (n + to - 1) / to * to; }

struct Grid {
    const char* name;
    int32_t kind, group;  // group 0: a whole row
    bool has_zeros, are_float32;
};
static const Grid GRIDS[] = {
    {"float32", FLOAT32, 0, false, false},      {"bfloat16", BFLOAT16, 0, false, false},
    {"int8 by 32", INT8, 32, false, false},     {"int8 by 64", INT8, 64, false, true},
    {"int8 by row", INT8, 0, false, true},      {"int4 by 32", INT4, 32, false, false},
    {"int4 by 64", INT4, 64, false, true},      {"int4 by row", INT4, 0, false, false},
    {"int4 zeros by 32", INT4, 32, true, true}, {"int4 zeros by 64", INT4, 64, true, false},
    {"int4 zeros by row", INT4, 0, true, true},
};

static void* aligned(size_t bytes) {
    void* all = nullptr;
    if (posix_memalign(&all, 64, bytes)) abort();
    memset(all, 0, bytes);
    return all;  // kept until the program ends
}

static float* numbers(size_t count, float size, float middle = 0) {
    float* all = (float*)aligned(count * 4);
    for (size_t i = 0; i < count; i++) all[i] = middle + size * number();
    return all;
}

// `count` scales or zeros, in the type that the grid has.
static void* scales(const Grid& grid, size_t count, bool are_zeros) {
    float* wide = (float*)aligned(count * 4);
    uint16_t* narrow = (uint16_t*)aligned(count * 2);
    for (size_t i = 0; i < count; i++) {
        wide[i] = are_zeros ? float(bits() % 16) : (1.5f + number()) / (grid.kind == INT8 ? 512 : 32);
        narrow[i] = upper_half(wide[i]);
    }
    return grid.are_float32 ? (void*)wide : (void*)narrow;
}

static Matrix matrix(const Grid& grid, int rows, int inner, bool has_bias) {
    Matrix w = {};
    const size_t all = size_t(up(rows, 16)) * up(inner, 32);
    w.kind = grid.kind;
    w.rows = rows;
    w.inner = up(inner, 32);
    if (grid.kind == FLOAT32) {
        w.weights = numbers(all, 0.3f);
    } else if (grid.kind == BFLOAT16) {
        uint16_t* stored = (uint16_t*)aligned(all * 2);
        for (size_t i = 0; i < all; i++) stored[i] = upper_half(0.3f * number());
        w.weights = stored;
    } else {
        uint8_t* stored = (uint8_t*)aligned(all);
        for (size_t i = 0; i < (grid.kind == INT8 ? all : all / 2); i++) stored[i] = uint8_t(bits());
        w.weights = stored;
        w.group = grid.group ? grid.group : w.inner;
        w.scales_are_float32 = grid.are_float32;
        const size_t count = size_t(up(rows, 16)) * (w.inner / w.group);
        w.scales = scales(grid, count, false);
        if (grid.has_zeros) w.zeros = scales(grid, count, true);
    }
    if (has_bias) w.bias = numbers(up(rows, 16), 1);
    return w;
}

static void check_products(const Library& library) {
    Layer layer = {};
    Model model = {};
    model.hidden = 32, model.heads = model.kv_heads = 1, model.head_dim = 16, model.layer = &layer;
    Engine* engine = library.open(&model, 2);
    for (const Grid& grid : GRIDS)
        for (int rows : {1, 17, 37}) {
            state = 1;  // a case's inputs do not hang on those before
            const Matrix w = matrix(grid, rows, 192, rows == 17);
            const int stride = up(rows, 16);
            for (int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 35}) {
                const float* x = numbers(size_t(tokens) * w.inner, 3);
                std::vector<float> y(size_t(tokens) * stride), real;
                library.multiply(engine, &w, x, tokens, y.data(), 0);
                for (int t = 0; t < tokens; t++) real.insert(real.end(), &y[size_t(t) * stride], &y[size_t(t) * stride] + rows);
                const std::string name = std::string(grid.name) + ", " + std::to_string(rows) + " rows, " + std::to_string(tokens);
                print("multiply " + name + " tokens", real.data(), real.size());
            }
        }
    library.close(engine);
}

// A model whose every size is odd in some way: heads of 24 numbers, 40 hidden, 72 between, 37 tokens to choose from.
static Model tiny(const Grid& grid, bool kv_is_half, int activation, Layer* layers) {
    state = 2;
    Model m = {};
    m.layers = 2, m.hidden = 40, m.heads = 4, m.kv_heads = 2, m.head_dim = 24, m.intermediate = 72, m.vocabulary = 37;
    m.activation = activation, m.rotary_dim = 16, m.page = 32, m.kv_is_half = kv_is_half;
    m.norm_epsilon = 1e-5f, m.attention_scale = 0.2f, m.embedding_scale = 1.5f;
    for (int i = 0; i < m.layers; i++) {
        Layer& layer = layers[i];
        layer.qkv = matrix(grid, (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden, true);
        layer.output = matrix(grid, m.hidden, m.heads * m.head_dim, false);
        layer.gate_up = matrix(grid, 2 * up(m.intermediate, 16), m.hidden, false);
        layer.down = matrix(grid, m.hidden, m.intermediate, false);
        layer.input_norm = numbers(m.hidden, 0.2f, 1);
        layer.feed_norm = numbers(m.hidden, 0.2f, 1);
        if (i == 1) {
            layer.query_norm = numbers(m.head_dim, 0.2f, 1);
            layer.key_norm = numbers(m.head_dim, 0.2f, 1);
            layer.attention_out_norm = numbers(m.hidden, 0.2f, 1);
            layer.feed_out_norm = numbers(m.hidden, 0.2f, 1);
            layer.window = 40;
        }
    }
    m.layer = layers;
    m.embedding = new Matrix(matrix(grid, m.vocabulary, m.hidden, false));
    m.head = new Matrix(matrix(grid, m.vocabulary, m.hidden, false));
    m.final_norm = numbers(m.hidden, 0.2f, 1);
    m.rotary_cos = new const float*[1]{numbers(256 * 16, 1)};
    m.rotary_sin = new const float*[1]{numbers(256 * 16, 1)};
    return m;
}

// Two sequences, of 150 tokens and of 3, then `steps` times one token more of each.
static void check_step(const Library& library, const std::string& name, const Model& m, int steps) {
    Engine* engine = library.open(&m, 2);
    std::vector<void*> pages[2];
    for (auto& own : pages)
        for (int i = 0; i < 8; i++) own.push_back(aligned(size_t(library.page_bytes(&m))));
    void* const* tables[2] = {pages[0].data(), pages[1].data()};
    int length[2] = {0, 0};
    for (int step = 0; step <= steps; step++) {
        const int count[2] = {step ? 1 : 150, step ? 1 : 3}, all = count[0] + count[1], stride = up(m.vocabulary, 16);
        std::vector<int32_t> ids(all);
        for (auto& id : ids) id = int32_t(bits() % m.vocabulary);
        const int32_t start[3] = {0, count[0], all}, position[2] = {length[0], length[1]}, outputs[2] = {count[0] - 1, all - 1};
        std::vector<float> logits(size_t(2) * stride), shown;
        int32_t largest[2];
        float margin[2];
        Batch batch = {};
        batch.tokens = all, batch.runs = 2, batch.outputs = 2, batch.check = 1, batch.bad_layer = -1;
        batch.ids = ids.data(), batch.run_start = start, batch.run_position = position, batch.run_pages = tables;
        batch.output_token = outputs, batch.logits = logits.data(), batch.largest = largest, batch.margin = margin;
        library.step(engine, &batch);
        float found[3] = {1, 1, float(batch.bad_layer)};
        for (int i = 0; i < 2; i++) {
            const float* own = &logits[size_t(i) * stride];
            shown.insert(shown.end(), own, own + m.vocabulary);
            shown.push_back(margin[i]);
            for (int v = 0; v < m.vocabulary; v++)
                if (own[v] > own[largest[i]]) found[i] = 0;
            length[i] += count[i];
        }
        print("step " + name + ", " + std::to_string(step), shown.data(), shown.size());
        print("chosen " + name + ", " + std::to_string(step), found, 3);
    }
    library.close(engine);
}

int main(int count, char** arguments) {
    if (count != 2) return 2;
    const Library library(arguments[1]);
    printf("isa\t%s %s\n", library.isa(), NAME(INFOPT_ISA));
    check_functions();
    check_bytes();
    check_products(library);
    for (const Grid& grid : GRIDS)
        for (int kv_is_half : {0, 1}) {
            if (grid.kind >= INT8 && grid.group != 32) continue;
            Layer layers[2] = {};
            const Model m = tiny(grid, kv_is_half, kv_is_half ? GELU_TANH : SILU, layers);
            check_step(library, std::string(grid.name) + (kv_is_half ? ", half" : ", float"), m, 3);
        }
    Layer layers[2] = {};
    const Model broken = tiny(GRIDS[0], true, SILU, layers);
    ((float*)layers[1].feed_norm)[3] = std::numeric_limits<float>::quiet_NaN();
    check_step(library, "not a number", broken, 0);
}
