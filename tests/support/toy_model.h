/* toy_model.h: the six small shapes of the test plan; weights come from synthetic_open.
 *
 *   toy_mha8   8/8 heads            even everything; super-blocks of 256 columns fit
 *   toy_gqa3   9/3                  3 kv heads, uneven ffn and vocabulary, like SmolLM2
 *   toy_gqa2   14/2, QKV bias       fewer kv heads than ranks, tied, like Qwen2.5
 *   toy_gqa5   40/8, QKV bias       5 query heads a kv head, like QwQ
 *   toy_qk     16/8, QK norm        q width is not the hidden size, prime vocabulary, like Qwen3
 *   toy_kv10   20/10                more kv heads than slabs, uneven
 */
#ifndef SFUMATO_TESTS_TOY_MODEL_H
#define SFUMATO_TESTS_TOY_MODEL_H

#include <stdbool.h>

#include "load/config.h"

/* The six names, then NULL. */
extern const char *const toy_names[];
/* False when there is no such toy. */
bool toy_config(const char *name, struct model_config *out);

#endif
