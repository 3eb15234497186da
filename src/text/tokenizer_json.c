/* tokenizer_json.c: tokenizer.json (Hugging Face `tokenizers`) -> tokenizer.
 *
 * Reads model (BPE only), added_tokens, normalizer, pre_tokenizer, post_processor and decoder;
 * whatever changes ids or text and is not supported is refused with its type's name. "truncation"
 * and "padding" are left out, as transformers does for generation. From tokenizer_config.json come
 * only bos and eos and added tokens that tokenizer.json lacks.
 *
 * Hostile input: jansson bounds nesting; counts are bounded by TOKENIZER_VOCAB_MAX and by the
 * file's size; every member's type is checked before use.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/tokenizer.h"
#include "text/tokenizer_build.h"
#include "text/utf8.h"

static enum status refuse(const char *section, const char *what) {
    return fail(
        STATUS_MODEL,
        "tokenizer.json: the %s \"%.80s\" is not supported (only byte-level BPE tokenizers are)",
        section, what);
}

static enum status malformed(const char *what) {
    return fail(STATUS_MODEL, "tokenizer.json: %s is missing or of the wrong type", what);
}

static const char *type_of(const json_t *object) {
    const char *type = json_string_value(json_object_get(object, "type"));
    return type == NULL ? "" : type;
}

static bool flag(const json_t *object, const char *name, bool otherwise) {
    const json_t *v = json_object_get(object, name);
    return json_is_boolean(v) ? json_is_true(v) : otherwise;
}

static bool is_empty_text(const json_t *v) {
    return v == NULL || json_is_null(v) || (json_is_string(v) && json_string_length(v) == 0);
}

static bool is_type(const json_t *object, const char *type) {
    return strcmp(type_of(object), type) == 0;
}

/* Calls `one` for the object, or for each member of its list when it is a "Sequence". */
typedef enum status section_reader(tokenizer *t, const json_t *object);
static enum status each(tokenizer *t, const json_t *object, const char *list_name,
                        section_reader *one) {
    if (object == NULL || json_is_null(object)) return STATUS_OK;
    if (!json_is_object(object)) return malformed(list_name);
    if (!is_type(object, "Sequence")) return one(t, object);
    const json_t *list = json_object_get(object, list_name);
    if (!json_is_array(list)) return malformed(list_name);
    size_t i;
    json_t *item;
    json_array_foreach(list, i, item) TRY(each(t, item, list_name, one));
    return STATUS_OK;
}

/* {"Regex": "..."} or {"String": "..."} */
static enum status read_pattern(const json_t *object, const char **text, size_t *n, bool *literal) {
    const json_t *pattern = json_object_get(object, "pattern");
    const json_t *regex = json_object_get(pattern, "Regex");
    const json_t *string = json_object_get(pattern, "String");
    const json_t *v = regex != NULL ? regex : string;
    if (!json_is_string(v)) return malformed("a \"pattern\"");
    *text = json_string_value(v);
    *n = json_string_length(v);
    *literal = regex == NULL;
    return STATUS_OK;
}

/* --- normalizer, pre_tokenizer, post_processor, decoder -------------------------------------- */

static enum status read_normalizer(tokenizer *t, const json_t *object) {
    static const char *const forms[] = {"NFC", "NFD", "NFKC", "NFKD"};
    static const enum normal_form values[] = {NORMAL_NFC, NORMAL_NFD, NORMAL_NFKC, NORMAL_NFKD};
    for (int i = 0; i < 4; i++)
        if (is_type(object, forms[i])) return normalizer_add_form(t->normalizer, values[i]);
    if (is_type(object, "Prepend")) {
        const json_t *text = json_object_get(object, "prepend");
        if (!json_is_string(text)) return malformed("\"prepend\"");
        return normalizer_add_prepend(t->normalizer, json_string_value(text),
                                      json_string_length(text));
    }
    if (is_type(object, "Replace")) {
        const char *pattern;
        size_t n;
        bool literal;
        TRY(read_pattern(object, &pattern, &n, &literal));
        const json_t *content = json_object_get(object, "content");
        if (!json_is_string(content)) return malformed("\"content\"");
        return normalizer_add_replace(t->normalizer, pattern, n, literal,
                                      json_string_value(content), json_string_length(content));
    }
    return refuse("normalizer", type_of(object));
}

static enum status read_behavior(const json_t *object, enum split_behavior *out) {
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const char *name = json_string_value(json_object_get(object, "behavior"));
    for (int i = 0; name != NULL && i < 5; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *out = (enum split_behavior)i;
        return STATUS_OK;
    }
    return refuse("split behavior", name == NULL ? "" : name);
}

static enum status read_pretokenizer(tokenizer *t, const json_t *object) {
    static const char number[] = "\\p{N}", punctuation[] = "[!-/:-@\\[-`{-~\\p{P}]";
    enum split_behavior behavior;
    if (is_type(object, "ByteLevel"))
        return pretokenizer_add_byte_level(t->pretokenizer, flag(object, "add_prefix_space", true),
                                           flag(object, "use_regex", true));
    if (is_type(object, "Split")) {
        const char *pattern;
        size_t n;
        bool literal;
        TRY(read_pattern(object, &pattern, &n, &literal));
        TRY(read_behavior(object, &behavior));
        return pretokenizer_add_split(t->pretokenizer, pattern, n, literal, behavior,
                                      flag(object, "invert", false));
    }
    if (is_type(object, "Digits")) {
        behavior = flag(object, "individual_digits", false) ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
        return pretokenizer_add_split(t->pretokenizer, number, strlen(number), false, behavior,
                                      false);
    }
    if (is_type(object, "Punctuation")) {
        behavior = SPLIT_ISOLATED;
        if (json_object_get(object, "behavior") != NULL) TRY(read_behavior(object, &behavior));
        return pretokenizer_add_split(t->pretokenizer, punctuation, strlen(punctuation), false,
                                      behavior, false);
    }
    return refuse("pre-tokenizer", type_of(object));
}

/* Ids of one SpecialToken of a template, appended to ids. */
static enum status read_template_token(const json_t *object, const json_t *token, uint32_t *ids,
                                       int *count) {
    const char *name = json_string_value(json_object_get(token, "id"));
    if (name == NULL) return malformed("a SpecialToken's \"id\"");
    const json_t *known = json_object_get(json_object_get(object, "special_tokens"), name);
    const json_t *list = json_object_get(known, "ids");
    if (!json_is_array(list)) return malformed("\"special_tokens\" of the post-processor");
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) {
        if (*count == FRAME_IDS_MAX) return refuse("post-processor", "a template of many ids");
        if (!json_is_integer(v) || json_integer_value(v) < 0 ||
            json_integer_value(v) > TOKENIZER_VOCAB_MAX)
            return malformed("an id of the post-processor");
        ids[(*count)++] = (uint32_t)json_integer_value(v);
    }
    return STATUS_OK;
}

static enum status read_template(tokenizer *t, const json_t *object) {
    const json_t *single = json_object_get(object, "single");
    if (!json_is_array(single)) return malformed("\"single\" of the post-processor");
    uint32_t before[FRAME_IDS_MAX], after[FRAME_IDS_MAX];
    int before_count = 0, after_count = 0, sequence_count = 0;
    size_t i;
    json_t *part;
    json_array_foreach(single, i, part) {
        const json_t *token = json_object_get(part, "SpecialToken");
        if (json_object_get(part, "Sequence") != NULL)
            sequence_count++;
        else if (token == NULL)
            return malformed("a part of the post-processor's template");
        else if (sequence_count == 0)
            TRY(read_template_token(object, token, before, &before_count));
        else
            TRY(read_template_token(object, token, after, &after_count));
    }
    if (sequence_count != 1)
        return refuse("post-processor", "a template without exactly one sequence");
    for (int k = before_count; k-- > 0;) TRY(tokenizer_add_frame(t, true, before[k]));
    for (int k = 0; k < after_count; k++) TRY(tokenizer_add_frame(t, false, after[k]));
    return STATUS_OK;
}

static enum status read_post_processor(tokenizer *t, const json_t *object) {
    if (is_type(object, "ByteLevel")) return STATUS_OK; /* only moves offsets */
    /* A second template in a Sequence sees the parts that the first one made, not a text. */
    if (t->before_count + t->after_count > 0)
        return refuse("post-processor", "a sequence of templates");
    if (is_type(object, "TemplateProcessing")) return read_template(t, object);
    if (is_type(object, "RobertaProcessing")) { /* "cls": ["<s>", 0], "sep": ["</s>", 2] */
        const json_t *cls = json_array_get(json_object_get(object, "cls"), 1);
        const json_t *sep = json_array_get(json_object_get(object, "sep"), 1);
        if (!json_is_integer(cls) || !json_is_integer(sep) || json_integer_value(cls) < 0 ||
            json_integer_value(sep) < 0 || json_integer_value(cls) > TOKENIZER_VOCAB_MAX ||
            json_integer_value(sep) > TOKENIZER_VOCAB_MAX)
            return malformed("\"cls\" or \"sep\" of the post-processor");
        TRY(tokenizer_add_frame(t, true, (uint32_t)json_integer_value(cls)));
        return tokenizer_add_frame(t, false, (uint32_t)json_integer_value(sep));
    }
    return refuse("post-processor", type_of(object));
}

/* ByteLevel makes one string of all tokens; Fuse, which joins strings, then has nothing to do. */
static enum status read_decoder(tokenizer *t, const json_t *object) {
    if (is_type(object, "ByteLevel") && !t->decodes_bytes) {
        t->decodes_bytes = true;
        return STATUS_OK;
    }
    if (is_type(object, "Fuse") && t->decodes_bytes) return STATUS_OK;
    return refuse("decoder", type_of(object));
}

/* --- model ----------------------------------------------------------------------------------- */

static enum status read_vocab(const json_t *vocab, tokenizer **out) {
    long long last = -1;
    const char *key;
    json_t *id;
    json_object_foreach((json_t *)vocab, key, id) {
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= TOKENIZER_VOCAB_MAX)
            return fail(STATUS_MODEL, "tokenizer.json: the token \"%.64s\" has no valid id", key);
        if (json_integer_value(id) > last) last = json_integer_value(id);
    }
    tokenizer *t = NULL;
    TRY(tokenizer_begin((size_t)(last + 1), &t));
    json_object_foreach((json_t *)vocab, key, id) {
        const enum status status =
            tokenizer_add_model_token(t, (size_t)json_integer_value(id), key, strlen(key));
        if (status == STATUS_OK) continue;
        tokenizer_close(t);
        return status;
    }
    *out = t;
    return STATUS_OK;
}

/* "left right" (old files) or ["left", "right"]. */
static enum status read_merge(tokenizer *t, const json_t *merge) {
    struct tokenizer_string left, right;
    if (json_is_string(merge)) {
        const char *text = json_string_value(merge), *space = strchr(text, ' ');
        if (space == NULL || strchr(space + 1, ' ') != NULL) return malformed("a merge");
        left = (struct tokenizer_string){text, (size_t)(space - text)};
        right = (struct tokenizer_string){space + 1, strlen(space + 1)};
    } else {
        const json_t *l = json_array_get(merge, 0), *r = json_array_get(merge, 1);
        if (json_array_size(merge) != 2 || !json_is_string(l) || !json_is_string(r))
            return malformed("a merge");
        left = (struct tokenizer_string){json_string_value(l), json_string_length(l)};
        right = (struct tokenizer_string){json_string_value(r), json_string_length(r)};
    }
    return bpe_add_merge(t->bpe, left, right);
}

static enum status read_model(const json_t *model, tokenizer **out) {
    if (!json_is_object(model)) return malformed("\"model\"");
    const json_t *vocab = json_object_get(model, "vocab"),
                 *merges = json_object_get(model, "merges");
    /* Very old files do not name the type; only BPE has merges. */
    if (!is_type(model, "BPE") && (type_of(model)[0] != '\0' || merges == NULL))
        return refuse("model", type_of(model));
    if (!json_is_object(vocab)) return malformed("\"vocab\"");
    if (!json_is_array(merges)) return malformed("\"merges\"");
    const json_t *dropout = json_object_get(model, "dropout");
    if (json_is_number(dropout) && json_number_value(dropout) != 0)
        return refuse("model option", "dropout");
    if (!is_empty_text(json_object_get(model, "continuing_subword_prefix")))
        return refuse("model option", "continuing_subword_prefix");
    if (!is_empty_text(json_object_get(model, "end_of_word_suffix")))
        return refuse("model option", "end_of_word_suffix");
    tokenizer *t = NULL;
    TRY(read_vocab(vocab, &t));
    enum status status = STATUS_OK;
    struct bpe_options options = {
        .ignore_merges = flag(model, "ignore_merges", false),
        .byte_fallback = flag(model, "byte_fallback", false),
        .fuse_unk = flag(model, "fuse_unk", false),
        .unk_id = -1,
    };
    TRY_GOTO(bpe_new(t->model, t->model_count, options, json_array_size(merges), &t->bpe), out);
    const json_t *unk = json_object_get(model, "unk_token");
    if (json_is_string(unk)) {
        const int id = bpe_find(t->bpe, json_string_value(unk), json_string_length(unk));
        if (id >= 0) bpe_set_unk(t->bpe, id);
    }
    size_t i;
    json_t *merge;
    json_array_foreach(merges, i, merge) TRY_GOTO(read_merge(t, merge), out);
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    return status;
}

/* --- added tokens and the configuration ------------------------------------------------------ */

static enum status read_added(tokenizer *t, const json_t *item, long long id) {
    const json_t *content = json_object_get(item, "content");
    if (!json_is_string(content)) return malformed("an added token's \"content\"");
    if (id < 0 || id >= TOKENIZER_VOCAB_MAX) return malformed("an added token's \"id\"");
    const bool special = flag(item, "special", false);
    return tokenizer_add_entry(t, (struct added_entry){
                                      .text = json_string_value(content),
                                      .n = json_string_length(content),
                                      .id = (uint32_t)id,
                                      .single_word = flag(item, "single_word", false),
                                      .lstrip = flag(item, "lstrip", false),
                                      .rstrip = flag(item, "rstrip", false),
                                      .normalized = flag(item, "normalized", !special),
                                      .special = special,
                                  });
}

static enum status read_added_tokens(tokenizer *t, const json_t *list) {
    if (list == NULL || json_is_null(list)) return STATUS_OK;
    if (!json_is_array(list)) return malformed("\"added_tokens\"");
    size_t i;
    json_t *item;
    json_array_foreach(list, i, item) {
        const json_t *id = json_object_get(item, "id");
        TRY(read_added(t, item, json_is_integer(id) ? json_integer_value(id) : -1));
    }
    return STATUS_OK;
}

/* "bos_token": "<s>" or {"content": "<s>", ...} */
static int find_config_token(const tokenizer *t, const json_t *config, const char *name) {
    const json_t *v = json_object_get(config, name);
    if (json_is_object(v)) v = json_object_get(v, "content");
    return json_is_string(v) ? tokenizer_find(t, json_string_value(v)) : -1;
}

/* "added_tokens_decoder": {"151643": {"content": ...}, ...} repeats tokenizer.json's; what is new
 * there is added after it, in the order of its ids. */
static enum status read_config(tokenizer *t, const json_t *config) {
    const char *key;
    json_t *item;
    json_object_foreach(json_object_get(config, "added_tokens_decoder"), key, item) {
        char *end;
        const long long id = strtoll(key, &end, 10);
        if (*key == '\0' || *end != '\0') return malformed("an id of \"added_tokens_decoder\"");
        TRY(read_added(t, item, id));
    }
    return STATUS_OK;
}

enum status tokenizer_open_json(const char *json, size_t n, const char *config_json,
                                size_t config_n, tokenizer **out) {
    *out = NULL;
    if (n > TOKENIZER_FILE_BYTES_MAX || config_n > TOKENIZER_FILE_BYTES_MAX)
        return fail(STATUS_MODEL, "tokenizer.json is larger than %d bytes",
                    TOKENIZER_FILE_BYTES_MAX);
    enum status status = STATUS_OK;
    tokenizer *t = NULL;
    json_t *config = NULL;
    json_error_t error;
    json_t *root = json_loadb(json, n, JSON_ALLOW_NUL, &error);
    if (root == NULL) {
        status = fail(STATUS_MODEL, "tokenizer.json is not valid JSON: line %d: %s", error.line,
                      error.text);
        goto out;
    }
    if (config_json != NULL) {
        /* model_max_length may be 10^30: an integer that only a real can hold */
        config = json_loadb(config_json, config_n, JSON_DECODE_INT_AS_REAL, &error);
        if (config == NULL) {
            status = fail(STATUS_MODEL, "tokenizer_config.json is not valid JSON: line %d: %s",
                          error.line, error.text);
            goto out;
        }
    }
    TRY_GOTO(read_model(json_object_get(root, "model"), &t), out);
    TRY_GOTO(each(t, json_object_get(root, "normalizer"), "normalizers", read_normalizer), out);
    TRY_GOTO(each(t, json_object_get(root, "pre_tokenizer"), "pretokenizers", read_pretokenizer),
             out);
    TRY_GOTO(each(t, json_object_get(root, "post_processor"), "processors", read_post_processor),
             out);
    TRY_GOTO(each(t, json_object_get(root, "decoder"), "decoders", read_decoder), out);
    if (!t->decodes_bytes) {
        status = refuse("decoder", "without ByteLevel");
        goto out;
    }
    TRY_GOTO(read_added_tokens(t, json_object_get(root, "added_tokens")), out);
    if (config != NULL) TRY_GOTO(read_config(t, config), out);
    TRY_GOTO(tokenizer_end(t), out);
    t->bos = find_config_token(t, config, "bos_token");
    t->eos = find_config_token(t, config, "eos_token");
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    json_decref(root);
    json_decref(config);
    return status;
}
