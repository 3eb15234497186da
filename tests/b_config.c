/* b_config.c: config.json and generation_config.json, and the shapes known by name. */
#include "base/log.h"
#include "load/config.h"
#include "suite.h"
#include "support/toy_model.h"

#define QWEN                                                                                   \
    "\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":896,\"intermediate_size\":4864," \
    "\"num_hidden_layers\":24,\"num_attention_heads\":14,\"num_key_value_heads\":2,"           \
    "\"vocab_size\":151936"
#define LLAMA                                                                                    \
    "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":4096,\"intermediate_size\":14336," \
    "\"num_hidden_layers\":32,\"num_attention_heads\":32,\"vocab_size\":128256"
#define MISTRAL                                                                    \
    "\"model_type\":\"mistral\",\"hidden_size\":4096,\"intermediate_size\":14336," \
    "\"num_hidden_layers\":32,\"num_attention_heads\":32,\"vocab_size\":32000"
#define QWEN3                                                                                   \
    "\"architectures\":[\"Qwen3ForCausalLM\"],\"hidden_size\":1024,\"intermediate_size\":3072," \
    "\"num_hidden_layers\":28,\"num_attention_heads\":16,\"num_key_value_heads\":8,"            \
    "\"vocab_size\":151936"

static enum status parse(struct model_config *c, const char *json, const char *generation) {
    return config_from_json(c, json, strlen(json), generation, generation ? strlen(generation) : 0);
}

static void test_families(void) {
    struct model_config c;
    CHECK_EQ(parse(&c,
                   "{" QWEN ",\"tie_word_embeddings\":true,\"rope_theta\":1000000.0,"
                   "\"torch_dtype\":\"bfloat16\",\"max_position_embeddings\":32768}",
                   NULL),
             STATUS_OK);
    CU_ASSERT(c.arch == ARCH_QWEN2 && c.qkv_bias && !c.qk_norm && c.tied);
    CHECK_EQ(c.head_dim, 64);
    CHECK_EQ(c.file_dtype, DTYPE_BF16);
    CU_ASSERT(c.rope_theta == 1e6 && c.rope == ROPE_PLAIN && c.embed_scale == 1.0f);

    /* what is missing takes the class default of transformers */
    CHECK_EQ(parse(&c, "{" LLAMA "}", NULL), STATUS_OK);
    CU_ASSERT(c.arch == ARCH_LLAMA && !c.qkv_bias && !c.tied);
    CHECK_EQ(c.kv_heads, 32);
    CHECK_EQ(c.head_dim, 128);
    CHECK_EQ(c.max_positions, 2048);
    CU_ASSERT(c.rope_theta == 10000 && c.norm_eps == 1e-6f);
    CHECK_EQ(c.bos_id, -1);
    CHECK_EQ(c.eos_count, 0);

    CHECK_EQ(parse(&c, "{" MISTRAL "}", NULL), STATUS_OK);
    CHECK_EQ(c.arch, ARCH_MISTRAL);
    CHECK_EQ(c.kv_heads, 8);

    CHECK_EQ(parse(&c, "{" QWEN3 "}", NULL), STATUS_OK);
    CU_ASSERT(c.arch == ARCH_QWEN3 && c.qk_norm && !c.qkv_bias);
    CHECK_EQ(c.head_dim, 128); /* not 1024 / 16 */
    CHECK_EQ(parse(&c, "{" QWEN3 ",\"head_dim\":64,\"dtype\":\"float32\"}", NULL), STATUS_OK);
    CHECK_EQ(c.head_dim, 64);
    CHECK_EQ(c.file_dtype, DTYPE_F32);
}

static void check_llama3(const char *json) {
    struct model_config c;
    CHECK_EQ(parse(&c, json, NULL), STATUS_OK);
    CHECK_EQ(c.rope, ROPE_LLAMA3);
    CU_ASSERT(c.rope_theta == 500000 && c.rope_factor == 8 && c.rope_low_freq_factor == 1 &&
              c.rope_high_freq_factor == 4);
    CHECK_EQ(c.rope_original_positions, 8192);
}

static void test_rope_spellings(void) {
    struct model_config c;
    check_llama3("{" LLAMA
                 ",\"rope_theta\":500000.0,\"rope_scaling\":{\"rope_type\":\"llama3\","
                 "\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
                 "\"original_max_position_embeddings\":8192}}");
    check_llama3("{" LLAMA
                 ",\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":500000,"
                 "\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
                 "\"original_max_position_embeddings\":8192}}");
    CHECK_EQ(parse(&c, "{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.5}}", NULL),
             STATUS_OK);
    CU_ASSERT(c.rope == ROPE_LINEAR && c.rope_factor == 2.5);
    CHECK_EQ(parse(&c, "{" LLAMA ",\"rope_scaling\":null}", NULL), STATUS_OK);
    CHECK_EQ(
        parse(&c, "{" QWEN ",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1e6}}",
              NULL),
        STATUS_OK);
    CU_ASSERT(c.rope == ROPE_PLAIN && c.rope_theta == 1e6);
}

static void test_end_ids(void) {
    struct model_config c;
    CHECK_EQ(
        parse(&c, "{" QWEN ",\"bos_token_id\":151643,\"eos_token_id\":151645}",
              "{\"eos_token_id\":[151645,151643],\"temperature\":0.7,\"top_p\":0.8,\"top_k\":20}"),
        STATUS_OK);
    CHECK_EQ(c.bos_id, 151643);
    CHECK_EQ(c.eos_count, 2);
    CHECK_EQ(c.eos_ids[0], 151645);
    CHECK_EQ(c.eos_ids[1], 151643);
    CHECK_EQ(c.top_k, 20);
    CU_ASSERT(c.temperature == 0.7f && c.top_p == 0.8f && c.min_p < 0);
    CHECK_EQ(parse(&c, "{" LLAMA ",\"eos_token_id\":[1,2,3]}", "{}"), STATUS_OK);
    CHECK_EQ(c.eos_count, 3);
    CU_ASSERT(c.temperature < 0 && c.top_p < 0 && c.top_k < 0);
    CHECK_EQ(parse(&c, "{" LLAMA ",\"eos_token_id\":null,\"bos_token_id\":null}",
                   "{\"bos_token_id\":5}"),
             STATUS_OK);
    CHECK_EQ(c.eos_count, 0);
    CHECK_EQ(c.bos_id, 5);
}

static void test_sliding_window(void) {
    struct model_config c;
    CHECK_EQ(
        parse(&c, "{" MISTRAL ",\"max_position_embeddings\":32768,\"sliding_window\":4096}", NULL),
        STATUS_OK);
    CHECK_EQ(c.max_positions, 4096); /* Mistral 7B v0.1 */
    CHECK_EQ(
        parse(&c, "{" MISTRAL ",\"max_position_embeddings\":32768,\"sliding_window\":null}", NULL),
        STATUS_OK);
    CHECK_EQ(c.max_positions, 32768);
    CHECK_EQ(parse(&c, "{" MISTRAL ",\"max_position_embeddings\":32768}", NULL), STATUS_OK);
    CHECK_EQ(c.max_positions, 4096); /* MistralConfig's own default */
    CHECK_EQ(parse(&c, "{" QWEN ",\"max_position_embeddings\":32768}", NULL), STATUS_OK);
    CHECK_EQ(c.max_positions, 32768);
    CHECK_EQ(parse(&c, "{" LLAMA ",\"max_position_embeddings\":32768}", NULL), STATUS_OK);
    CHECK_EQ(c.max_positions, 32768);
    CHECK_EQ(parse(&c,
                   "{" QWEN ",\"max_position_embeddings\":32768,\"sliding_window\":4096,"
                   "\"use_sliding_window\":false,\"max_window_layers\":21}",
                   NULL),
             STATUS_OK);
    CHECK_EQ(c.max_positions, 32768);
    CHECK_EQ(parse(&c,
                   "{" QWEN ",\"max_position_embeddings\":32768,\"sliding_window\":4096,"
                   "\"use_sliding_window\":true,\"max_window_layers\":21}",
                   NULL),
             STATUS_OK);
    CHECK_EQ(c.max_positions, 4096);
    CHECK_EQ(parse(&c,
                   "{" QWEN ",\"max_position_embeddings\":32768,\"sliding_window\":4096,"
                   "\"use_sliding_window\":true,\"max_window_layers\":24}",
                   NULL),
             STATUS_OK);
    CHECK_EQ(c.max_positions, 32768); /* no layer is left for the window */
}

static void test_refusals(void) {
    static const struct {
        const char *json, *message;
    } cases[] = {
        {"", "config.json line"},
        {"[]", "not a JSON object"},
        {"{\"a\":", "config.json line"},
        {"{}", "neither architectures nor model_type"},
        {"{\"architectures\":[\"GPT2LMHeadModel\"]}", "GPT2LMHeadModel is not supported"},
        {"{\"architectures\":[\"LlamaForCausalLM\"]}", "num_hidden_layers is missing"},
        {"{" LLAMA ",\"num_hidden_layers\":0}", "num_hidden_layers is 0"},
        {"{" LLAMA ",\"num_hidden_layers\":\"32\"}", "num_hidden_layers is \"32\""},
        {"{" LLAMA ",\"num_hidden_layers\":1.5}", "num_hidden_layers is 1.5"},
        {"{" LLAMA ",\"num_hidden_layers\":4294967328}", "num_hidden_layers is 4294967328"},
        {"{" LLAMA ",\"hidden_size\":-4096}", "hidden_size is -4096"},
        {"{" LLAMA ",\"vocab_size\":1e300}", "vocab_size is 1"},
        {"{" LLAMA ",\"vocab_size\":99999999999999999999}", "config.json line"},
        {"{" LLAMA ",\"num_key_value_heads\":5}", "32 attention heads and 5 kv heads"},
        {"{" LLAMA ",\"num_key_value_heads\":64}", "32 attention heads and 64 kv heads"},
        {"{" LLAMA ",\"hidden_size\":4097}", "not a multiple"},
        {"{" LLAMA ",\"head_dim\":7}", "head size 7"},
        {"{" LLAMA ",\"head_dim\":100000}", "head_dim is 100000"},
        {"{" LLAMA ",\"rms_norm_eps\":0}", "rms_norm_eps"},
        {"{" LLAMA ",\"rms_norm_eps\":2}", "rms_norm_eps is 2"},
        {"{" LLAMA ",\"rope_theta\":0}", "rope_theta is 0"},
        {"{" LLAMA ",\"rope_scaling\":7}", "must be an object"},
        {"{" LLAMA ",\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}}",
         "\"yarn\" is not supported"},
        {"{" LLAMA ",\"rope_scaling\":{\"rope_type\":\"linear\"}}", "factor is missing"},
        {"{" LLAMA ",\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0}}", "factor is 0"},
        {"{" LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":4}}",
         "high_freq_factor 4 must be above"},
        {"{" LLAMA ",\"partial_rotary_factor\":0.5}", "partial_rotary_factor is 0.5"},
        {"{" LLAMA ",\"attention_bias\":true}", "attention_bias is true"},
        {"{" LLAMA ",\"mlp_bias\":true}", "mlp_bias is true"},
        {"{" LLAMA ",\"hidden_act\":\"gelu\"}", "hidden_act gelu"},
        {"{" LLAMA ",\"torch_dtype\":\"float8\"}", "dtype float8"},
        {"{" LLAMA ",\"tie_word_embeddings\":\"no\"}", "tie_word_embeddings is \"no\""},
        {"{" LLAMA ",\"quantization_config\":{\"quant_method\":\"gptq\"}}", "quantization_config"},
        {"{" LLAMA ",\"quantization_config\":7}", "quantization_config"},
        {"{" LLAMA ",\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e5m2\"}}", "e5m2"},
        {"{" LLAMA ",\"quantization_config\":{\"quant_method\":\"compressed-tensors\","
         "\"format\":\"pack-quantized\"}}",
         "pack-quantized"},
        {"{" LLAMA ",\"quantization_config\":{\"quant_method\":\"fp8\","
         "\"weight_block_size\":[128,64]}}",
         "weight_block_size"},
        {"{" LLAMA ",\"eos_token_id\":128256}", "end id 128256"},
        {"{" LLAMA ",\"eos_token_id\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}",
         "more than 16 end ids"},
        {"{" LLAMA ",\"eos_token_id\":\"</s>\"}", "eos_token_id is"},
        {"{" LLAMA ",\"bos_token_id\":128256}", "bos_token_id is 128256"},
        {"{" LLAMA ",\"max_position_embeddings\":0}", "max_position_embeddings is 0"},
        {"{" QWEN ",\"layer_types\":[\"linear_attention\"]}", "layer_types has linear_attention"},
    };
    struct model_config c;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        /* the last of two equal keys counts: transformers' and jansson's rule alike */
        CHECK_EQ(parse(&c, cases[i].json, NULL), STATUS_MODEL);
        const bool found = strstr(fail_text(), cases[i].message) != NULL;
        if (!found)
            printf("\n    %s: \"%s\" lacks \"%s\"\n", cases[i].json, fail_text(), cases[i].message);
        CU_ASSERT(found);
    }
    static const char *const generations[] = {"{\"temperature\":-1}",  "{\"top_p\":1.5}",
                                              "{\"top_k\":\"x\"}",     "{\"min_p\":2}",
                                              "{\"eos_token_id\":-7}", "nonsense"};
    for (size_t i = 0; i < sizeof generations / sizeof generations[0]; i++) {
        CHECK_EQ(parse(&c, "{" LLAMA "}", generations[i]), STATUS_MODEL);
        CU_ASSERT(strstr(fail_text(), "generation_config.json") != NULL);
    }
}

/* Every prefix of a config is refused, none crashes. */
static void test_truncated(void) {
    const char *json =
        "{" QWEN ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},\"eos_token_id\":[1,2]}";
    struct model_config c;
    for (size_t n = 0; n < strlen(json); n++) {
        CHECK_EQ(config_from_json(&c, json, n, NULL, 0), STATUS_MODEL);
    }
    CHECK_EQ(config_from_json(&c, json, strlen(json), NULL, 0), STATUS_OK);
}

/* The totals that the models' pages on the Hugging Face hub give for their safetensors files. */
static void test_known_shapes(void) {
    static const struct {
        const char *name;
        int64_t parameters;
    } cases[] = {{"smollm2-135m", 134515008},  {"qwen2.5-0.5b", 494032768},
                 {"qwen2.5-1.5b", 1543714304}, {"qwq-32b", 32763876352},
                 {"llama-3.1-8b", 8030261248}, {"llama-3.1-70b", 70553706496}};
    struct model_config c;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK_EQ(config_from_dims(&c, cases[i].name), STATUS_OK);
        CHECK_EQ(config_check(&c), STATUS_OK);
        CHECK_EQ(config_parameter_count(&c), cases[i].parameters);
        const int64_t lookup = c.tied ? 0 : (int64_t)c.vocab_rows * c.hidden;
        CHECK_EQ(config_step_parameter_count(&c), cases[i].parameters - lookup);
    }
    CHECK_EQ(c.rope, ROPE_LLAMA3);
    CHECK_EQ(c.eos_count, 3);
    CHECK_EQ(config_from_dims(&c, "gpt-5"), STATUS_USAGE);
    CU_ASSERT(strstr(fail_text(), "llama-3.1-70b") != NULL);
    CHECK_EQ(config_from_dims(&c, suite_path("models/tiny/config.json")), STATUS_OK);
    CHECK_EQ(c.arch, ARCH_QWEN3);
    for (int i = 0; toy_names[i]; i++) {
        CU_ASSERT(toy_config(toy_names[i], &c));
        CHECK_EQ(config_check(&c), STATUS_OK);
    }
}

int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    log_init(LOG_ERROR, false); /* the window warnings are meant */
    return 0;
}

const struct suite_case suite_cases[] = {
    {"four families and their defaults", test_families},
    {"both spellings of RoPE", test_rope_spellings},
    {"end ids and generation defaults", test_end_ids},
    {"an active sliding window limits the context", test_sliding_window},
    {"refusals name the field", test_refusals},
    {"every truncation is refused", test_truncated},
    {"known shapes have the published parameter counts", test_known_shapes},
    {NULL, NULL}};
