// What Python hands over: plain C structs, all pointers borrowed. `infopt/kernels/library.py` has the same fields.
#pragma once

#include <cstdint>

extern "C" {

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
enum SourceKind { SOURCE_FLOAT32 = 0, SOURCE_BFLOAT16 = 1, SOURCE_FLOAT16 = 2, SOURCE_INT8 = 3 };
enum Activation { SILU = 0, GELU_TANH = 1 };

// Weights [rows, inner] in blocks of 16 rows: `infopt/kernels/packing.py` says how they lie. Both are padded with zeros, rows
// to 16 and inner to 32; `rows` counts real ones, `inner` padded ones.
struct Matrix {
    int32_t kind, rows, inner, group;  // group: inputs that share a scale, a multiple of 32
    const void* weights;
    const void* scales;  // [blocks, groups, 16], bfloat16 or float32; null for floating-point weights
    const void* zeros;   // as scales: what is subtracted from the stored integers; null when symmetric
    const float* bias;   // [rows padded] or null
    int32_t scales_are_float32;
};

// Weights as a module holds them: row after row, `stride` elements apart. Integers are q, signed.
struct Source {
    int32_t kind, rows, inner;
    int64_t stride;
    const void* data;
};

struct Layer {
    Matrix qkv, output, gate_up, down;  // gate_up: 16 rows of gate, 16 of up, and so on
    const float* input_norm;            // RMSNorm weights as they are multiplied; null where there is no norm
    const float* query_norm;            // [head_dim] or null
    const float* key_norm;
    const float* attention_out_norm;
    const float* feed_norm;
    const float* feed_out_norm;
    int32_t window;  // positions that attention reaches back, itself included; 0: all
    int32_t rotary;  // which of the model's tables
};

struct Model {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, activation;
    int32_t rotary_dim, page, kv_is_half;  // page: positions, a multiple of 16
    float norm_epsilon, attention_scale, embedding_scale;
    const Layer* layer;
    const Matrix* embedding;  // read by row
    const Matrix* head;
    const float* final_norm;
    const float* const* rotary_cos;  // tables [positions, rotary_dim]
    const float* const* rotary_sin;
};

// New tokens, run by run: the tokens of a run follow one another in one sequence.
struct Batch {
    int32_t tokens, runs, outputs, check;  // outputs: rows of logits wanted; check: look for the first layer with a NaN
    int32_t is_prompt;                     // sums may differ from those that its tokens would have one by one
    const int32_t* ids;                    // [tokens]
    const int32_t* run_start;              // [runs + 1] into tokens
    const int32_t* run_position;           // [runs]: position of a run's first token
    void* const* const* run_pages;         // [runs]: pages of its sequence, in order
    const int32_t* output_token;           // [outputs]: which tokens' logits
    float* logits;                         // [outputs, vocabulary padded to 16] or null: only the largest are wanted
    int32_t* largest;                      // [outputs]
    float* margin;                         // [outputs]: distance to the second largest logit; NaN where a logit is NaN
    int32_t bad_layer;                     // out: first layer whose output is not finite, `layers` for the head, or −1
};

struct Engine;

const char* infopt_isa();
int64_t infopt_page_bytes(const Model* model);
Engine* infopt_open(const Model* model, int32_t threads);
// Another model on the threads of `other`, which may be closed before it: never a step of both at a time.
Engine* infopt_open_beside(const Model* model, Engine* other);
void infopt_close(Engine* engine);
void infopt_step(Engine* engine, Batch* batch);
// Fills blocks of `to` (weights, and scales where they are rounded here) from a source: its first 16 rows become block
// `first_block`, the next ones the block `every` further on.
void infopt_pack(const Matrix* to, const Source* from, int32_t first_block, int32_t every, int32_t threads);
// y [tokens, rows padded to 16] = x [tokens, inner]·Wᵀ + bias, for tests and for linear layers by themselves
void infopt_multiply(Engine* engine, const Matrix* w, const float* x, int32_t tokens, float* y, int32_t is_prompt);
double infopt_read_seconds(Engine* engine, const void* data, int64_t bytes);
}
