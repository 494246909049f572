// The library's C interface. One library is built for each instruction set, and Python loads the one that fits: no code of
// another one can be reached by accident.
#include "pack.h"
#include "reading.h"

using namespace INFOPT_ISA;

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

struct Engine {
    Step step;
    Engine(const Model& model, std::shared_ptr<Pool> threads) : step(model, std::move(threads)) {}
};

extern "C" {

const char* infopt_isa() { return NAME(INFOPT_ISA); }
int64_t infopt_page_bytes(const Model* model) { return page_bytes(*model); }
Engine* infopt_open(const Model* model, int32_t threads) { return new Engine(*model, std::make_shared<Pool>(threads)); }
Engine* infopt_open_beside(const Model* model, Engine* other) { return new Engine(*model, other->step.threads()); }
void infopt_close(Engine* engine) { delete engine; }
void infopt_step(Engine* engine, Batch* batch) { engine->step.run(*batch); }
void infopt_pack(const Matrix* to, const Source* from, int32_t first_block, int32_t every, int32_t threads) {
    pack_source(*to, *from, first_block, every, threads);
}
void infopt_multiply(Engine* engine, const Matrix* w, const float* x, int32_t tokens, float* y, int32_t is_prompt) {
    engine->step.multiply(*w, x, tokens, y, is_prompt);
}
double infopt_read_seconds(Engine* engine, const void* data, int64_t bytes) {
    return engine->step.read_seconds((const uint8_t*)data, bytes);
}
}
