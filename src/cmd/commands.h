/* commands.h: the sub-commands, one file each. Called on every rank by main.c; see struct command. */
#ifndef SFUMATO_CMD_COMMANDS_H
#define SFUMATO_CMD_COMMANDS_H

#include "cmd/host.h"

enum status cmd_generate(struct host *h); /* generate.c */
enum status cmd_score(struct host *h);    /* score.c */
enum status cmd_tokenize(struct host *h); /* tokenize.c */
enum status cmd_inspect(struct host *h);  /* inspect.c */
enum status cmd_bench(struct host *h);    /* bench.c */
enum status cmd_selftest(struct host *h); /* selftest.c */
enum status cmd_serve(struct host *h);    /* serve.c */
void cmd_serve_before(void);

#endif
