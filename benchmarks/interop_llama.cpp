// A GGUF file in llama.cpp, through its C interface alone: greedy tokens, log-probabilities of a text, its tokenizer.
//
//   interop_llama MODEL.gguf < REQUEST > ANSWER
//
// One request a line, answered in lines of numbers:
//   greedy COUNT ID…   the new tokens; their log-probabilities; the distance to the second likeliest, each
//   score ID…          the log-probability of each id but the first, given those before it
//   encode HEX         the ids of a text, given as the hexadecimal of its bytes
//   time COUNT ID…     seconds for the ids, and for COUNT greedy tokens after the first, with llama.cpp's own settings

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

template <typename T> static void print(const std::vector<T> & values) {
    for (size_t i = 0; i < values.size(); ++i) std::cout << (i ? " " : "") << values[i];
    std::cout << "\n";
}

// The logarithm of the sum of exponentials, by which logits become log-probabilities.
static double normalizer(const float * logits, int count) {
    const double top = *std::max_element(logits, logits + count);
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += std::exp(logits[i] - top);
    return top + std::log(sum);
}

static llama_context * open(llama_model * model, size_t tokens) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t) (tokens + 8);
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;  // what is compared is the weights, not a rounded cache
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(model, params);
}

static bool greedy(llama_model * model, std::vector<llama_token> ids, int count) {
    const int rows = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> made;
    std::vector<double> logprobs, margins;
    llama_context * context = open(model, ids.size() + count);
    for (int step = 0; context && step < count; ++step) {
        if (llama_decode(context, llama_batch_get_one(ids.data(), (int) ids.size()))) return false;
        const float * logits = llama_get_logits_ith(context, -1);
        const int best = (int) (std::max_element(logits, logits + rows) - logits);
        float second = -INFINITY;
        for (int i = 0; i < rows; ++i) if (i != best) second = std::max(second, logits[i]);
        made.push_back(best);
        logprobs.push_back(logits[best] - normalizer(logits, rows));
        margins.push_back(logits[best] - second);
        ids = {best};
    }
    if (!context) return false;
    llama_free(context);
    print(made), print(logprobs), print(margins);
    return true;
}

static bool time(llama_model * model, std::vector<llama_token> ids, int count) {
    using clock = std::chrono::steady_clock;
    const int rows = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t) (ids.size() + count + 8);
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = 2;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return false;
    auto start = clock::now();
    std::vector<double> seconds;
    for (int step = 0; step <= count; ++step) {
        if (llama_decode(context, llama_batch_get_one(ids.data(), (int) ids.size()))) return false;
        const float * logits = llama_get_logits_ith(context, -1);
        ids = {(llama_token) (std::max_element(logits, logits + rows) - logits)};
        if (step == 0 || step == count) {
            seconds.push_back(std::chrono::duration<double>(clock::now() - start).count());
            start = clock::now();
        }
    }
    llama_free(context);
    print(seconds);
    std::cout.flush();
    return true;
}

static bool score(llama_model * model, const std::vector<llama_token> & ids) {
    const int rows = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context * context = open(model, ids.size());
    if (!context) return false;
    llama_batch batch = llama_batch_init((int) ids.size(), 0, 1);
    for (size_t i = 0; i < ids.size(); ++i) {
        batch.token[i] = ids[i], batch.pos[i] = (llama_pos) i, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = 1;
    }
    batch.n_tokens = (int) ids.size();
    if (llama_decode(context, batch)) return false;
    std::vector<double> logprobs;
    for (size_t i = 1; i < ids.size(); ++i) {
        const float * logits = llama_get_logits_ith(context, (int) i - 1);
        logprobs.push_back(logits[ids[i]] - normalizer(logits, rows));
    }
    llama_batch_free(batch);
    llama_free(context);
    print(logprobs);
    return true;
}

static bool encode(llama_model * model, const std::string & hex) {
    std::string text;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) text.push_back((char) std::stoi(hex.substr(i, 2), nullptr, 16));
    std::vector<llama_token> ids(text.size() + 8);
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int count = llama_tokenize(vocab, text.data(), (int) text.size(), ids.data(), (int) ids.size(), true, true);
    ids.resize(std::max(count, 0));
    print(ids);
    return count >= 0;
}

int main(int argc, char ** argv) {
    if (argc != 2) return fprintf(stderr, "usage: interop_llama MODEL.gguf\n"), 2;
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    std::cout.precision(9);
    std::string line, verb, hex;
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        words >> verb;
        bool done;
        if (verb == "encode") {
            words >> hex;
            done = encode(model, hex);
        } else {
            int count = 0;
            if (verb == "greedy" || verb == "time") words >> count;
            const std::vector<llama_token> ids{std::istream_iterator<llama_token>(words), {}};
            done = verb == "greedy" ? greedy(model, ids, count) : verb == "time" ? time(model, ids, count) : score(model, ids);
        }
        if (!done) return fprintf(stderr, "llama.cpp fails at: %.60s\n", line.c_str()), 1;
    }
    llama_model_free(model);
    return 0;
}
