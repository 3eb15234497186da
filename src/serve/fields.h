/* fields.h: typed access to the members of a request's JSON, with the one wording of their errors.
 *
 * Every reader leaves its output alone when the member is absent or null (JSON null = absent), and
 * fails with STATUS_REQUEST and `param` = the dotted path. `prefix` is "" at the top level,
 * "soft_thinking." inside that block. Pure; internal to serve/.
 */
#ifndef SFUMATO_SERVE_FIELDS_H
#define SFUMATO_SERVE_FIELDS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "base/params.h"

/* The member, or NULL when absent or null. */
json_t *field_get(const json_t *object, const char *key);

enum status field_bool(const json_t *object, const char *prefix, const char *key, bool *out);
enum status field_int(const json_t *object, const char *prefix, const char *key, int64_t low,
                      int64_t high, int64_t *out);
enum status field_real(const json_t *object, const char *prefix, const char *key, double low,
                       double high, double *out);
enum status field_text(const json_t *object, const char *prefix, const char *key, const char **out);
/* A number whose range is that of a row of params.def: `row` names it ("temperature" inside the
 * block,
 * ".temperature" at the top level). *given (may be NULL) becomes true when it was there. */
enum status field_row(const json_t *object, const char *prefix, const char *key, const char *row,
                      double *out, bool *given);

/* "top_k": -1 and 0 come out as 0, off; else 1..vocab_count. */
enum status field_top_k(const json_t *object, const char *prefix, int vocab_count, int *out);

/* Every member is one of known[count]; otherwise it "must be left out: WHY". */
enum status field_only(const json_t *object, const char *const *known, size_t count,
                       const char *why);

/* "PREFIXKEY must be WHAT". */
enum status field_wrong(const char *prefix, const char *key, const char *what);

#endif
