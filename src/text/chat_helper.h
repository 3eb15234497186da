/* chat_helper.h: requests to the template helper process, inside src/text (chat.h starts and stops
 * it). */
#ifndef SFUMATO_TEXT_CHAT_HELPER_H
#define SFUMATO_TEXT_CHAT_HELPER_H

#include <jansson.h>

#include "text/chat.h"

/* Sends one request object and returns its answer object (the caller decrefs). A helper that is too
 * slow or dies is replaced by a new one at the next request. STATUS_REQUEST when this render was
 * too much for it, STATUS_MODEL when it cannot be started again. */
enum status chat_helper_ask(chat_helper *helper, const json_t *request, json_t **answer);
/* Any thread: see chat_abandon, chat_expect. */
void chat_helper_abandon(chat_helper *helper);
void chat_helper_expect(chat_helper *helper);

#endif
