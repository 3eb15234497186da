/* b_dequant.c: every number format against blocks decoded by the Python package gguf, bit for bit, and fp16
 * against its definition for all 65,536 patterns. */
#include "load/dequant.h"
#include "load/tensor_table.h"
#include "suite.h"
#include "support/vec.h"

static int hex_digit(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

static size_t from_hex(const char *hex, uint8_t *out) {
    const size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)(hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]));
    }
    return n;
}

static void test_golden_blocks(void) {
    struct vec_file v;
    uint8_t block[256 + 1];
    float got[256];
    int blocks = 0;
    vec_open(&v, "gguf_blocks.vec");
    while (vec_next(&v)) {
        const struct dequant_type *type = dequant_find_name(v.words[1]);
        CU_ASSERT_FATAL(type != NULL);
        CHECK_EQ(from_hex(v.words[2], block + 1),
                 type->bytes); /* odd address: input is unaligned */
        CHECK_EQ(v.word_count - 3, type->elements);
        type->decode(block + 1, 1, got);
        for (int i = 0; i < type->elements; i++) {
            const float want = vec_float(v.words[3 + i]);
            if (memcmp(&want, &got[i], 4) == 0) continue;
            printf("\n    %s column %d: %.9g, want %.9g\n", type->name, i, (double)got[i],
                   (double)want);
            CU_FAIL("a decoded number differs");
            break;
        }
        blocks++;
    }
    vec_close(&v);
    CHECK_EQ(blocks, 30); /* ten formats, three blocks of each */
}

static void test_f16(void) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double sign = bits >> 15 ? -1 : 1;
        const float got = dequant_f16((uint16_t)bits);
        if (exponent == 31) {
            CU_ASSERT(fraction ? isnan(got) : isinf(got) && (got < 0) == (sign < 0));
            continue;
        }
        const double want =
            exponent ? sign * ldexp(1024 + fraction, exponent - 25) : sign * ldexp(fraction, -24);
        CU_ASSERT((double)got == want && (signbit(got) != 0) == (bits >> 15 != 0));
    }
}

/* Two hand-written blocks: what the drawing in dequant.c says, in numbers one can do in the head. */
static void test_by_hand(void) {
    uint8_t q4_1[20] = {0x00, 0x40, 0x00, 0x3c}; /* d = 2, m = 1 */
    float out[32];
    q4_1[4] = 0xf3;
    dequant_find_name("Q4_1")->decode(q4_1, 1, out);
    CHECK_NEAR(out[0], 2 * 3 + 1, 0);
    CHECK_NEAR(out[16], 2 * 15 + 1, 0);
    CHECK_NEAR(out[1], 1, 0);
    uint8_t q5_0[22] = {0x00, 0x38, 0x01, 0x00, 0x00, 0x80}; /* d = 0.5, fifth bits of 0 and 31 */
    q5_0[6] = 0x02;
    dequant_find_name("Q5_0")->decode(q5_0, 1, out);
    CHECK_NEAR(out[0], 0.5 * (16 + 2 - 16), 0);
    CHECK_NEAR(out[1], 0.5 * (0 - 16), 0);
    CHECK_NEAR(out[31], 0.5 * (16 - 16), 0);
}

/* A read that starts and ends inside blocks equals the same columns of a whole row. */
static void test_column_ranges(void) {
    static const char *const names[] = {"F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_1", "Q6_K"};
    enum { COLS = 768, ROWS = 3 };
    static uint8_t data[ROWS * COLS * 4];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)suite_random(5, (uint32_t)i) & 0x3f;
    for (size_t t = 0; t < sizeof names / sizeof names[0]; t++) {
        struct tensor_entry e = {
            .type = dequant_find_name(names[t]), .rows = ROWS, .cols = COLS, .data = data};
        float whole[COLS], part[COLS];
        for (int row = 0; row < ROWS; row++) {
            tensor_read_row(&e, row, 0, COLS, whole);
            for (int begin = 0; begin < COLS; begin += 37) {
                for (int count = 0; begin + count <= COLS; count = 2 * count + 1) {
                    part[count < COLS ? count : 0] = 42.0f;
                    tensor_read_row(&e, row, begin, count, part);
                    CU_ASSERT(memcmp(part, whole + begin, (size_t)count * sizeof *part) == 0);
                    CU_ASSERT(count == COLS || part[count] == 42.0f);
                }
            }
        }
    }
}

static void test_names(void) {
    CHECK_STR(dequant_ggml_name(23), "IQ4_XS");
    CHECK_STR(dequant_ggml_name(10), "Q2_K");
    CHECK_STR(dequant_ggml_name(39), "MXFP4");
    CU_ASSERT(dequant_ggml_name(40) == NULL && dequant_find_ggml(10) == NULL);
    CHECK_STR(dequant_find_ggml(30)->name, "BF16");
}

const struct suite_case suite_cases[] = {
    {"fp16, all patterns", test_f16},
    {"hand-written blocks", test_by_hand},
    {"blocks decoded by the Python package gguf", test_golden_blocks},
    {"any range of columns", test_column_ranges},
    {"names of formats", test_names},
    {NULL, NULL}};
