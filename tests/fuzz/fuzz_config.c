/* layer: load */
/* fuzz_config.c: config.json, then a NUL and generation_config.json when there is one. */
#include <string.h>

#include "base/log.h"
#include "load/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    const char *text = (const char *)bytes;
    const char *cut = n ? memchr(text, 0, n) : NULL;
    const size_t json_n = cut ? (size_t)(cut - text) : n;
    struct model_config c;
    log_init(LOG_OFF, false);
    if (config_from_json(&c, text, json_n, cut ? cut + 1 : NULL, cut ? n - json_n - 1 : 0) ==
        STATUS_OK) {
        struct shard_dims dims;
        ASSERT(config_check(&c) == STATUS_OK);
        ASSERT(config_parameter_count(&c) > 0);
        ASSERT(c.eos_count <= CONFIG_EOS_MAX);
        config_shard_dims(&c, &dims);
    }
    return 0;
}
