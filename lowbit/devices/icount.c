/* A plugin of qemu's user mode that counts the arm64 instructions of a program, by class.
 *
 *     qemu-aarch64 -plugin file=icount.so,out=counts.txt program
 *
 * The program marks a point by the system call close(-4242), which does nothing else.  At each mark,
 * and at the end, a line with the counts since the line before goes to the file:
 *
 *     mark all=3252926 simd_fp=1410242 int8_dot=711000 ...
 *
 * Counters are added to at each execution of a translated block, without a lock: they are exact for
 * one thread.  A block that an instruction's fault cuts short counts whole.
 *
 * Debian ships no qemu-plugin.h: what is used of version 1 of its interface (qemu 4.2 to 8.2) is
 * declared here.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

typedef void (*on_translation_t)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*on_exit_t)(qemu_plugin_id_t, void *);
typedef void (*on_system_call_t)(qemu_plugin_id_t, unsigned vcpu, int64_t number, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, on_translation_t);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, on_system_call_t);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, on_exit_t, void *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *,
                                              uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

enum { ARM64_CLOSE = 57, MARK = -4242 };

/* What one instruction is counted as: ALL, one of the three groups or none, and within SIMD_FP one
 * of the three kinds of arithmetic or none. */
enum { ALL, SIMD_FP, INT8_DOT, INT_MULTIPLY_ADD, FP_FMA, MEMORY, BRANCH, CLASSES };
static const char *const names[CLASSES] = {
    "all", "simd_fp", "int8_dot", "int_multiply_add", "fp_fma", "memory", "branch",
};

/* An instruction belongs to the kind where its bits under the mask are the value.  Q (the vector's
 * width), the registers and the sizes that do not matter are outside the masks.  Arm Architecture
 * Reference Manual for A-profile, C4.1, "Data Processing -- Scalar Floating-Point and Advanced SIMD".
 */
static const struct {
    uint32_t mask, value;
    int kind;
} arithmetic[] = {
    {0x9fe0fc00, 0x0e809400, INT8_DOT}, /* SDOT, UDOT */
    {0x9fc0f400, 0x0f80e000, INT8_DOT}, /* SDOT, UDOT by element */
    {0xbfe0fc00, 0x0e809c00, INT8_DOT}, /* USDOT */
    {0xbf40f400, 0x0f00f000, INT8_DOT}, /* SUDOT, USDOT by element */
    {0xdfe0f400, 0x4e80a400, INT8_DOT}, /* SMMLA, UMMLA, USMMLA: 32 products, where a dot has 16 */
    {0x9f20fc00, 0x0e208000, INT_MULTIPLY_ADD}, /* SMLAL, UMLAL */
    {0x9f00f400, 0x0f002000, INT_MULTIPLY_ADD}, /* SMLAL, UMLAL by element */
    {0x9f20fc00, 0x0e20c000, INT_MULTIPLY_ADD}, /* SMULL, UMULL, the first of a sum */
    {0x9f00f400, 0x0f00a000, INT_MULTIPLY_ADD}, /* SMULL, UMULL by element */
    {0xbf20fc00, 0x0e209400, INT_MULTIPLY_ADD}, /* MLA */
    {0xbf00f400, 0x2f000000, INT_MULTIPLY_ADD}, /* MLA by element */
    {0xbf20fc00, 0x0e209c00, INT_MULTIPLY_ADD}, /* MUL */
    {0xbf00f400, 0x0f008000, INT_MULTIPLY_ADD}, /* MUL by element */
    {0xbf20fc00, 0x0e20cc00, FP_FMA},           /* FMLA, FMLS */
    {0xbf80b400, 0x0f801000, FP_FMA},           /* FMLA, FMLS by element */
    {0xbf60fc00, 0x0e400c00, FP_FMA},           /* FMLA, FMLS of float16 */
    {0xbfc0b400, 0x0f001000, FP_FMA},           /* FMLA, FMLS by element of float16 */
    {0xff000000, 0x1f000000, FP_FMA},           /* FMADD, FMSUB, FNMADD, FNMSUB: scalars */
};

static uint64_t counts[CLASSES], told[CLASSES];
static FILE *output;

static void classify(uint32_t word, uint64_t *found)
{
    unsigned group = word >> 25 & 0xf; /* op0 of the encoding's first table, C4.1 */

    found[ALL]++;
    if ((group & 0x5) == 0x4)
        found[MEMORY]++; /* loads and stores, those of vectors included */
    else if ((group & 0xe) == 0xa)
        found[BRANCH]++; /* branches, exceptions and system instructions */
    else if ((group & 0x7) == 0x7) {
        found[SIMD_FP]++;
        for (size_t i = 0; i < sizeof arithmetic / sizeof *arithmetic; i++)
            if ((word & arithmetic[i].mask) == arithmetic[i].value) {
                found[arithmetic[i].kind]++;
                break;
            }
    }
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    uint64_t found[CLASSES] = {0};

    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        classify(word, found);
    }
    for (int kind = 0; kind < CLASSES; kind++)
        if (found[kind])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64,
                                                     &counts[kind], found[kind]);
}

static void tell(const char *what)
{
    fprintf(output, "%s", what);
    for (int kind = 0; kind < CLASSES; kind++) {
        fprintf(output, " %s=%llu", names[kind], (unsigned long long)(counts[kind] - told[kind]));
        told[kind] = counts[kind];
    }
    fprintf(output, "\n");
    fflush(output);
}

static void on_system_call(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t file,
                           uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g,
                           uint64_t h)
{
    (void)id, (void)vcpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number == ARM64_CLOSE && (int32_t)file == MARK)
        tell("mark");
}

static void on_exit(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    tell("exit");
}

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

/* qemu refuses to start where this returns another value than 0. */
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *qemu, int count, char **arguments)
{
    (void)qemu;
    if (count != 1 || strncmp(arguments[0], "out=", 4)) {
        fprintf(stderr, "icount: give it out=FILE, where the counts go\n");
        return 1;
    }
    output = fopen(arguments[0] + 4, "w");
    if (!output) {
        perror(arguments[0] + 4);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    qemu_plugin_register_atexit_cb(id, on_exit, NULL);
    return 0;
}
