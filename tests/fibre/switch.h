/* switch.h: from one stack to another. ucontext does it too, but asks the kernel for the signal mask each
 * time, which is most of what an emulated barrier costs; x86-64 saves what a call must preserve, no more.
 * Thread: a context is entered on the OS thread that made it. Memory: the caller's stacks.
 */
#ifndef SFUMATO_TESTS_FIBRE_SWITCH_H
#define SFUMATO_TESTS_FIBRE_SWITCH_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)

typedef void *switch_context; /* the stack pointer, below it the saved registers */

extern "C" void fibre_switch(switch_context *from, switch_context to);
asm(".text\n"
    ".globl fibre_switch\n"
    ".hidden fibre_switch\n"
    ".type fibre_switch, @function\n"
    "fibre_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size fibre_switch, . - fibre_switch\n");

/* entry must not return. */
static inline void switch_make(switch_context *out, unsigned char *stack, size_t bytes,
                               void (*entry)()) {
    uintptr_t *top = (uintptr_t *)(((uintptr_t)stack + bytes) / 16 * 16);
    *--top = 0; /* where a return address would be */
    *--top = (uintptr_t)entry;
    for (int i = 0; i < 6; i++) *--top = 0;
    *out = top;
}
static inline void switch_to(switch_context *from, switch_context *to) { fibre_switch(from, *to); }

#else

#include <ucontext.h>

typedef ucontext_t switch_context;

static inline void switch_make(switch_context *out, unsigned char *stack, size_t bytes,
                               void (*entry)()) {
    getcontext(out);
    out->uc_stack.ss_sp = stack;
    out->uc_stack.ss_size = bytes;
    out->uc_link = nullptr;
    makecontext(out, entry, 0);
}
static inline void switch_to(switch_context *from, switch_context *to) { swapcontext(from, to); }

#endif

#endif
