/* log.h: one line, one write(2), to standard error.
 *
 * Owns the level, the format (text or JSON) and this rank's number for the prefix. Rank 0 logs
 * everything at or above the level; other ranks log warnings and errors only, so that nothing
 * appears R times. Threads: any; each line is one write. Memory: none. Never logs prompts or keys.
 */
#ifndef SFUMATO_BASE_LOG_H
#define SFUMATO_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR, LOG_OFF };

/* Call once before any thread starts; json: one JSON object a line instead of text. */
void log_init(enum log_level level, bool json);
void log_set_rank(int rank);
int log_rank(void);
bool log_enabled(enum log_level level);

void log_line(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A record for machines, of level info: `json` is an object (n bytes). Text: "sfumato: NAME {...}";
 * JSON lines: its members beside ts, level, rank and msg = NAME. */
void log_record(const char *name, const char *json, size_t n);

/* "sfumato: TEXT": the one line a failing command ends with, whatever the level. */
void log_failure(const char *text);

#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)
#define log_info(...) log_line(LOG_INFO, __VA_ARGS__)
#define log_warn(...) log_line(LOG_WARN, __VA_ARGS__)
#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)

#endif
