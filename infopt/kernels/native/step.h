// One step of a decoder: new tokens of some sequences in, logits out, all layers in one call on all threads.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "interface.h"
#include "matrix.h"
#include "pool.h"

namespace INFOPT_ISA {

// Tokens up to which every thread prepares all inputs of a product for itself, instead of a share of them and a barrier.
constexpr int FEW = 2;

struct Best {
    float first = -INFINITY, second = -INFINITY;
    int32_t index = 0;
    void offer(float x, int32_t i) {
        if (x > first) {
            second = first;
            first = x;
            index = i;
        } else if (x > second) {
            second = x;
        }
    }
};

// Some rows (token × query head of one key/value head) of a run, and a share of the positions behind them.
struct Task {
    int run, head, row, rows, split, splits;
};

class Step {
   public:
    // `pool` may run other models' steps too, one at a time.
    Step(const Model& model, std::shared_ptr<Pool> threads)
        : m(model), held(threads), pool(*threads), own(pool.most()), scratch(pool.most()), best(pool.most()),
          nothing(pool.most()) {
        width = padded(m.hidden, GROUP);
        queries = m.heads * m.head_dim;
        head_width = padded(m.head_dim);
        group = m.heads / m.kv_heads;
    }

    void run(Batch& batch) {
        in_prompt = batch.is_prompt;
        plan(batch);
        pool.run([&](int thread) { m.kv_is_half ? work<uint16_t>(batch, thread) : work<float>(batch, thread); });
        finish(batch);
    }

    void multiply(const Matrix& w, const float* x, int tokens, float* y, bool is_prompt) {
        const int stride = blocks_of(w) * LANES;
        in_prompt = is_prompt;
        shared.of(w.inner, tokens, splits_in(w, tokens));
        pool.run([&](int thread) {
            const Inputs in = prepare(w, tokens, thread, [&](int t, float* to) { memcpy(to, x + size_t(t) * w.inner, size_t(w.inner) * sizeof(float)); });
            products(w, in, tokens, thread, [&](int block, int t, int columns, F(*part)[MOST_TOGETHER]) {
                for (int c = 0; c < columns; c++) store(y + size_t(t + c) * stride + block * LANES, part[0][c]);
            });
        });
    }

    double read_seconds(const uint8_t* data, int64_t bytes);
    std::shared_ptr<Pool> threads() const { return held; }

    const Model m;

   private:
    int width, queries, head_width, group;
    bool in_prompt = false;  // many tokens, whose sums need not be those that they would have one by one
    const std::shared_ptr<Pool> held;
    Pool& pool;
    std::vector<Buffers> own;  // by thread
    Buffers shared;
    std::vector<float> hidden, joined, added, activated;  // [tokens, width], q + k + v, width, intermediate
    std::vector<Task> tasks;
    std::vector<int> first_task, splits, run_of;
    std::vector<float> parts;  // [tasks, ROWS, head_width]
    std::vector<Partial> partials;
    std::vector<std::vector<float>> scratch;
    std::vector<std::vector<Best>> best;
    std::vector<std::vector<F>> nothing;  // by thread and output: 0, or NaN where a logit is not finite

    int joined_width() const { return blocks_of(m.layer[0].qkv) * LANES; }

    void plan(const Batch& batch) {
        const int tokens = batch.tokens;
        hidden.assign(size_t(tokens) * width, 0.0f);
        added.assign(size_t(tokens) * width, 0.0f);
        joined.resize(size_t(tokens) * joined_width());
        activated.assign(size_t(tokens) * m.layer[0].down.inner, 0.0f);
        run_of.resize(tokens);
        tasks.clear();
        first_task.clear();
        splits.clear();
        for (int run = 0; run < batch.runs; run++) {
            const int begin = batch.run_start[run], count = batch.run_start[run + 1] - begin;
            for (int t = 0; t < count; t++) run_of[begin + t] = run;
            const int length = batch.run_position[run] + count, rows = count * group;
            first_task.push_back(int(tasks.size()));
            // By position alone: a token's sums must depend neither on those beside it nor on the machine. Prompts have rows enough.
            splits.push_back(in_prompt ? 1 : (length + STRETCH - 1) / STRETCH);
            for (int split = 0; split < splits.back(); split++)  // the last is shorter, and none should have all of those
                for (int head = 0; head < m.kv_heads; head++)
                    for (int row = 0; row < rows; row += ROWS)
                        tasks.push_back({run, head, row, std::min(ROWS, rows - row), split, splits.back()});
        }
        parts.resize(tasks.size() * ROWS * head_width);
        partials.resize(tasks.size());
        const int widest = std::max({width, padded(queries, GROUP), padded(m.intermediate, GROUP)});
        int most_parts = splits_in(*m.head, batch.outputs);
        for (int index = 0; in_prompt && index < m.layers; index++)
            for (const Matrix* w : {&m.layer[index].qkv, &m.layer[index].output, &m.layer[index].gate_up, &m.layer[index].down})
                most_parts = std::max(most_parts, splits_in(*w, tokens));
        shared.of(widest, tokens, most_parts);
        for (auto& buffers : own) buffers.of(widest, std::min(tokens, FEW));
        for (auto& each : best) each.assign(batch.outputs, Best());
        for (auto& each : nothing) each.assign(batch.outputs, zero());
    }

    // How many bfloat16 numbers stand for an input of a product; 0 where it is not made in prompts' tiles.
    int splits_in(const Matrix& w, int tokens) const { return in_prompt && is_for_prompts(w, tokens) ? parts_of(w) : 0; }

    // `make(token, to)` writes a token's inputs of a product; they are split or rounded as its weights want them.
    template <class Make>
    Inputs prepare(const Matrix& w, int tokens, int thread, Make make) {
        const bool few = tokens <= FEW;
        const Inputs in = (few ? own[thread] : shared).of(w.inner, tokens, splits_in(w, tokens));
        for (int t = few ? 0 : thread; t < tokens; t += few ? 1 : pool.threads()) {
            float* to = in.values + size_t(t) * w.inner;
            make(t, to);
            if (in.parts) {
                split_row(to, w.inner, in.parts, in.halves + size_t(t) * w.inner, in.apart);
            } else if (is_integer(w)) {
                round_row(in, t);
            }
        }
        if (!few) pool.barrier();
        return in;
    }

    // The blocks of rows that are a thread's, in units of `together`.
    std::pair<int, int> share(const Matrix& w, int thread, int together) const {
        const int64_t units = blocks_of(w) / together, threads = pool.threads();
        return {int(units * thread / threads) * together, int(units * (thread + 1) / threads) * together};
    }

    // Asks for the beginning of a thread's share of the weights that are used next, while threads wait for one another.
    void warm(const Matrix& w, int thread, int together = 1) const {
        const char* p = (const char*)w.weights + size_t(share(w, thread, together).first) * block_bytes(w);
        for (int i = -AHEAD; i < 0; i += 64) prefetch(p + i);
    }

    // Calls use(block, first token, columns, F y[TOGETHER][MOST_TOGETHER]) for all tokens' products with this thread's share
    // of the blocks of rows, TOGETHER of them at a time.
    template <int TOGETHER = 1, class Use>
    void products(const Matrix& w, const Inputs& in, int tokens, int thread, Use use) {
        auto [block, last] = share(w, thread, TOGETHER);
        if (in.parts) {
            const Tiled tiled(Tiles::HALVES);
            for (; block + 2 <= last; block += 2) prompt_products<TOGETHER, 2>(w, in, tokens, block, use);
            if (block < last) prompt_products<TOGETHER, TOGETHER>(w, in, tokens, block, use);
            return;
        }
        const Tiled tiled(is_tiled(w, tokens) ? Tiles::INTEGERS : Tiles::NONE);
        for (; block < last; block += TOGETHER)
            each_tile<TOGETHER>(w, in, tokens, block, [&](int t, int columns, F(*y)[MOST_TOGETHER]) { use(block, t, columns, y); });
    }

    // to = x·weight / √(mean x² + ε), `n` numbers; zeros behind them up to `end`.
    void normalise(const float* x, const float* weight, int n, float* to, int end) const {
        F squares = zero();
        int i = 0;
        for (; i + LANES <= n; i += LANES) squares = fma(load(x + i), load(x + i), squares);
        float total = sum(squares);
        for (int j = i; j < n; j++) total += x[j] * x[j];
        const float scale = 1.0f / std::sqrt(total / float(n) + m.norm_epsilon);
        for (int j = 0; j < n; j++) to[j] = x[j] * scale * weight[j];
        for (int j = n; j < end; j++) to[j] = 0;
    }

    template <class T>
    void work(Batch& batch, int thread) {
        const int tokens = batch.tokens;
        for (int t = thread; t < tokens; t += pool.threads()) {
            float* to = hidden.data() + size_t(t) * width;
            read_row(*m.embedding, batch.ids[t], to);
            for (int i = 0; i < m.hidden; i++) to[i] *= m.embedding_scale;
            for (int i = m.hidden; i < width; i++) to[i] = 0;
        }
        pool.barrier();
        for (int index = 0; index < m.layers; index++) {
            const Layer& layer = m.layer[index];
            Inputs in = prepare(layer.qkv, tokens, thread, [&](int t, float* to) { normed(t, layer.input_norm, to); });
            products(layer.qkv, in, tokens, thread, [&](int block, int t, int columns, F(*y)[MOST_TOGETHER]) {
                for (int c = 0; c < columns; c++) store(joined.data() + size_t(t + c) * joined_width() + block * LANES, y[0][c]);
            });
            warm(layer.output, thread);
            later<T>(batch, layer, index, thread).ask();
            pool.barrier();
            turn<T>(batch, layer, index, thread);
            pool.barrier();
            for (size_t task = thread; task < tasks.size(); task += pool.threads()) attend_task<T>(batch, layer, index, task, thread);
            pool.barrier();
            in = prepare(layer.output, tokens, thread, [&](int t, float* to) { combine(batch, t, to, layer.output.inner); });
            join(layer.output, in, tokens, thread, layer.attention_out_norm, layer.gate_up, 2);
            in = prepare(layer.gate_up, tokens, thread, [&](int t, float* to) { normed(t, layer.feed_norm, to); });
            feed(layer, in, tokens, thread);
            in = prepare(layer.down, tokens, thread, [&](int t, float* to) {
                memcpy(to, activated.data() + size_t(t) * layer.down.inner, size_t(layer.down.inner) * sizeof(float));
            });
            join(layer.down, in, tokens, thread, layer.feed_out_norm, index + 1 < m.layers ? m.layer[index + 1].qkv : *m.head);
            if (batch.check && thread == 0 && batch.bad_layer < 0 && !is_finite(tokens)) batch.bad_layer = index;
        }
        answer(batch, thread);
    }

    void normed(int t, const float* weight, float* to) const {
        const float* x = hidden.data() + size_t(t) * width;
        if (weight) return normalise(x, weight, m.hidden, to, width);
        memcpy(to, x, size_t(width) * sizeof(float));
    }

    bool is_finite(int tokens) const {
        for (size_t i = 0; i < size_t(tokens) * width; i++)
            if (!std::isfinite(hidden[i])) return false;
        return true;
    }

    // Adds a product to the hidden states, through a norm of its own where the layer has one. The product after it is of `next`,
    // `together` blocks at a time.
    void join(const Matrix& w, const Inputs& in, int tokens, int thread, const float* norm, const Matrix& next, int together = 1) {
        float* target = norm ? added.data() : hidden.data();
        products(w, in, tokens, thread, [&](int block, int t, int columns, F(*y)[MOST_TOGETHER]) {
            for (int c = 0; c < columns; c++) {
                float* to = target + size_t(t + c) * width + block * LANES;
                store(to, norm ? y[0][c] : add(load(to), y[0][c]));
            }
        });
        warm(next, thread, together);
        pool.barrier();
        if (!norm) return;
        for (int t = thread; t < tokens; t += pool.threads()) {
            float *x = added.data() + size_t(t) * width, *to = hidden.data() + size_t(t) * width;
            normalise(x, norm, m.hidden, x, width);
            for (int i = 0; i < m.hidden; i++) to[i] += x[i];
        }
        pool.barrier();
    }

    // Norms and rotary positions of queries and keys; keys and values into their pages.
    template <class T>
    void turn(const Batch& batch, const Layer& layer, int index, int thread) {
        const int each = m.heads + m.kv_heads;
        const float *cos = m.rotary_cos[layer.rotary], *sin = m.rotary_sin[layer.rotary];
        for (int item = thread; item < batch.tokens * each; item += pool.threads()) {
            const int t = item / each, head = item % each, run = run_of[t];
            const int position = batch.run_position[run] + t - batch.run_start[run];
            float* x = joined.data() + size_t(t) * joined_width() + size_t(head) * m.head_dim;
            const float* norm = head < m.heads ? layer.query_norm : layer.key_norm;
            if (norm) normalise(x, norm, m.head_dim, x, m.head_dim);
            const float *c = cos + size_t(position) * m.rotary_dim, *s = sin + size_t(position) * m.rotary_dim;
            for (int i = 0, half = m.rotary_dim / 2; i < half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a * c[i] - b * s[i];
                x[i + half] = b * c[i + half] + a * s[i + half];
            }
            if (head >= m.heads) {
                const Cache<T> cache(m, batch.run_pages[run], index, head - m.heads);
                cache.write(position, x, x + size_t(m.kv_heads) * m.head_dim);
            }
        }
    }

    // The positions that a task's rows look at.
    Queries looked_at(const Batch& batch, const Layer& layer, const Task& task) const {
        const int begin = batch.run_start[task.run], position = batch.run_position[task.run];
        Queries q;
        q.rows = task.rows;
        q.first = 1 << 30;
        q.last = 0;
        for (int r = 0; r < task.rows; r++) {
            const int row = task.row + r, t = begin + row / group;
            q.query[r] = joined.data() + size_t(t) * joined_width() + size_t(task.head * group + row % group) * m.head_dim;
            q.reach[r] = position + row / group + 1;
            q.from[r] = layer.window ? std::max(0, q.reach[r] - layer.window) : 0;
            q.first = std::min(q.first, q.from[r]);
            q.last = std::max(q.last, q.reach[r]);
        }
        if (task.splits == 1) return q;
        q.first = std::max(q.first, task.split * STRETCH);
        q.last = std::min(q.last, (task.split + 1) * STRETCH);
        return q;
    }

    template <class T>
    Later<T> later(const Batch& batch, const Layer& layer, int index, size_t number) const {
        if (number >= tasks.size()) return {Cache<T>(m, batch.run_pages[0], index, 0), 0, 0};
        const Task& task = tasks[number];
        const Queries q = looked_at(batch, layer, task);
        return {Cache<T>(m, batch.run_pages[task.run], index, task.head), q.first / LANES * LANES, q.last};
    }

    template <class T>
    void attend_task(const Batch& batch, const Layer& layer, int index, size_t number, int thread) {
        const Task& task = tasks[number];
        const Queries q = looked_at(batch, layer, task);
        float* out = parts.data() + number * ROWS * head_width;
        if (q.first >= q.last) {
            for (int r = 0; r < task.rows; r++) partials[number].most[r] = -INFINITY;
            return;
        }
        const Cache<T> cache(m, batch.run_pages[task.run], index, task.head);
        const Later<T> next = later<T>(batch, layer, index, number + pool.threads());
        attend(cache, q, m.attention_scale, scratch[thread], out, partials[number], next);
    }

    // All heads' outputs for a token, from the shares of positions.
    void combine(const Batch& batch, int t, float* to, int end) const {
        const int run = run_of[t], begin = batch.run_start[run];
        const int rows = (batch.run_start[run + 1] - begin) * group, tiles = (rows + ROWS - 1) / ROWS;
        const int across = m.kv_heads * tiles;  // from a share of the positions to the next
        for (int head = 0; head < m.heads; head++) {
            const int row = (t - begin) * group + head % group, lane = row % ROWS;
            const int first = first_task[run] + head / group * tiles + row / ROWS;
            float most = -INFINITY, total = 0;
            for (int s = 0; s < splits[run]; s++) most = std::max(most, partials[first + s * across].most[lane]);
            float* out = to + size_t(head) * m.head_dim;
            std::fill(out, out + m.head_dim, 0.0f);
            for (int s = 0; s < splits[run]; s++) {
                const Partial& part = partials[first + s * across];
                if (part.most[lane] == -INFINITY) continue;
                const float weight = std::exp(part.most[lane] - most);
                const float* from = parts.data() + (size_t(first + s * across) * ROWS + lane) * head_width;
                total += weight * part.total[lane];
                for (int d = 0; d < m.head_dim; d++) out[d] += weight * from[d];
            }
            for (int d = 0; d < m.head_dim; d++) out[d] /= total;
        }
        std::fill(to + queries, to + end, 0.0f);
    }

    // act(gate)·up, the inputs of `down`.
    void feed(const Layer& layer, const Inputs& in, int tokens, int thread) {
        const bool is_silu = m.activation == SILU;
        const int stride = layer.down.inner;
        products<2>(layer.gate_up, in, tokens, thread, [&](int block, int t, int columns, F(*y)[MOST_TOGETHER]) {
            for (int c = 0; c < columns; c++)
                store(
                    activated.data() + size_t(t + c) * stride + block / 2 * LANES,
                    mul(is_silu ? silu(y[0][c]) : gelu_tanh(y[0][c]), y[1][c]));
        });
        warm(layer.down, thread);
        pool.barrier();
    }

    void answer(Batch& batch, int thread) {
        if (!batch.outputs) return;
        const Matrix& w = *m.head;
        const int stride = blocks_of(w) * LANES;
        const Inputs in = prepare(w, batch.outputs, thread, [&](int i, float* to) { normed(batch.output_token[i], m.final_norm, to); });
        products(w, in, batch.outputs, thread, [&](int block, int i, int columns, F(*y)[MOST_TOGETHER]) {
            for (int c = 0; c < columns; c++) offer(batch, thread, i + c, block, y[0][c], stride);
        });
    }

    void offer(Batch& batch, int thread, int output, int block, F y, int stride) {
        Best& found = best[thread][output];
        F& bad = nothing[thread][output];
        bad = fma(y, zero(), bad);
        if (batch.logits) store(batch.logits + size_t(output) * stride + block * LANES, y);
        if (!(largest(y) > found.second)) return;
        alignas(64) float each[LANES];
        store(each, y);
        for (int i = 0; i < LANES && block * LANES + i < m.vocabulary; i++) found.offer(each[i], block * LANES + i);
    }

    void finish(Batch& batch) {
        for (int i = 0; i < batch.outputs; i++) {
            Best all;
            float bad = 0;
            for (size_t thread = 0; thread < best.size(); thread++) {
                all.offer(best[thread][i].first, best[thread][i].index);
                all.offer(best[thread][i].second, -1);
                bad += sum(nothing[thread][i]);
            }
            batch.largest[i] = all.index;
            batch.margin[i] = bad == 0 ? all.first - all.second : NAN;
            if (!(bad == 0) && batch.check && batch.bad_layer < 0) batch.bad_layer = m.layers;
        }
    }
};

}  // namespace INFOPT_ISA
