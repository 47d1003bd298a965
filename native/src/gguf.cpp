#include "model.h"
namespace pp {
pp_model* open_gguf(const char*, const pp_options*) { fail("not yet"); return nullptr; }
}  // namespace pp
