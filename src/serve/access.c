/* access.c: see access.h. */
#include "serve/access.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/json.h"
#include "base/sha256.h"

enum { KEY_FILE_BYTES_MAX = 1 << 20 };

struct access {
    unsigned char (*digests)[SHA256_BYTES]; /* [key_count] */
    int key_count;
    bool loopback; /* bound to a loopback address */
    bool no_auth;
    const char *origins; /* comma list, or NULL */
};

/* ---- keys ---- */

static enum status add_key(struct access *a, const char *key, size_t n) {
    while (n > 0 && strchr(" \t\r\n", key[n - 1])) n--;
    while (n > 0 && strchr(" \t", *key)) {
        key++;
        n--;
    }
    if (n == 0) return STATUS_OK;
    void *grown = realloc(a->digests, ((size_t)a->key_count + 1) * SHA256_BYTES);
    if (!grown) return fail(STATUS_MEMORY, "no memory for keys");
    a->digests = grown;
    sha256(key, n, a->digests[a->key_count++]);
    return STATUS_OK;
}

static enum status add_file(struct access *a, const char *path) {
    char *text = NULL;
    size_t n = 0;
    TRY(json_read_file(path, KEY_FILE_BYTES_MAX, false, STATUS_USAGE, &text, &n));
    enum status status = STATUS_OK;
    for (char *line = text; *line && status == STATUS_OK;) {
        const size_t length = strcspn(line, "\n");
        status = add_key(a, line, length);
        line += length + (line[length] == '\n');
    }
    explicit_bzero(text, n);
    free(text);
    if (status == STATUS_OK && a->key_count == 0) {
        return fail(STATUS_USAGE, "--api-key-file %s: there is no key in it", path);
    }
    return status;
}

/* All keys are always tried, all bytes always compared. */
static bool is_key(const struct access *a, const char *key, size_t n) {
    unsigned char given[SHA256_BYTES];
    int found = 0;
    sha256(key, n, given);
    for (int i = 0; i < a->key_count; i++) {
        unsigned char differs = 0;
        for (int b = 0; b < SHA256_BYTES; b++) {
            differs = (unsigned char)(differs | (given[b] ^ a->digests[i][b]));
        }
        found |= differs == 0;
    }
    return found != 0;
}

bool access_needs_key(const struct access *a) { return a->key_count > 0; }

bool access_key_ok(const struct access *a, const char *header) {
    if (a->key_count == 0) return true;
    if (!header || strncasecmp(header, "Bearer ", 7) != 0) return false;
    header += 7;
    while (*header == ' ') header++;
    return is_key(a, header, strlen(header));
}

/* ---- names ---- */

bool access_is_loopback(const char *name) {
    char host[256];
    struct in_addr v4;
    struct in6_addr v6;
    snprintf(host, sizeof host, "%s", name);
    char *begin = host;
    if (*host == '[') { /* [::1]:8000 */
        char *end = strchr(host, ']');
        if (!end || (end[1] != '\0' && end[1] != ':')) return false;
        *end = '\0';
        begin = host + 1;
    } else {
        char *colon = strchr(host, ':');
        if (colon && !strchr(colon + 1, ':')) *colon = '\0';
    }
    const size_t n = strlen(begin);
    if (n > 0 && begin[n - 1] == '.') begin[n - 1] = '\0';
    if (strcasecmp(begin, "localhost") == 0) return true;
    const char *tail = strlen(begin) > 10 ? begin + strlen(begin) - 10 : "";
    if (strcasecmp(tail, ".localhost") == 0) return true;
    if (inet_pton(AF_INET, begin, &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
    return inet_pton(AF_INET6, begin, &v6) == 1 &&
           (IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127));
}

bool access_host_ok(const struct access *a, const char *host) {
    if (a->key_count > 0 || !a->loopback) return true;
    return host && access_is_loopback(host);
}

bool access_admin_ok(const struct access *a, const char *header, const char *peer) {
    if (a->key_count > 0) return access_key_ok(a, header);
    return a->loopback && peer && access_is_loopback(peer);
}

bool access_origin_ok(const struct access *a, const char *origin) {
    const size_t n = strlen(origin);
    for (const char *item = a->origins; item && *item;) {
        item += strspn(item, ", ");
        const size_t length = strcspn(item, ", ");
        if (length == 1 && *item == '*') return true;
        if (length == n && n > 0 && strncasecmp(item, origin, n) == 0) return true;
        item += length;
    }
    return false;
}

/* ---- life ---- */

/* "https://example.org:8443", without a path: as browsers send it. */
static enum status check_origins(const char *list) {
    for (const char *item = list; item && *item;) {
        item += strspn(item, ", ");
        const int length = (int)strcspn(item, ", ");
        const char *name = strstr(item, "://");
        const bool any = length == 1 && *item == '*';
        if (length > 0 && !any &&
            (!name || name + 3 >= item + length ||
             memchr(name + 3, '/', (size_t)(item + length - name - 3)))) {
            return fail(STATUS_USAGE,
                        "--allowed-origins: %.*s is no origin: scheme://host[:port], or *", length,
                        item);
        }
        item += length;
    }
    return STATUS_OK;
}

enum status access_new(const struct params *params, struct access **out) {
    enum status status = STATUS_OK;
    *out = NULL;
    struct access *a = calloc(1, sizeof *a);
    if (!a) return fail(STATUS_MEMORY, "no memory for keys");
    a->no_auth = params->no_auth;
    a->origins = params->allowed_origins;
    a->loopback = access_is_loopback(params->host);
    TRY_GOTO(check_origins(a->origins), out);
    if (params->api_key) {
        TRY_GOTO(add_key(a, params->api_key, strlen(params->api_key)), out);
        if (a->key_count == 0) TRY_GOTO(fail(STATUS_USAGE, "--api-key: the key is empty"), out);
    }
    if (params->api_key_file) TRY_GOTO(add_file(a, params->api_key_file), out);
    if (!a->loopback && a->key_count == 0 && !a->no_auth) {
        TRY_GOTO(fail(STATUS_USAGE,
                      "--host %s can be reached from other machines: pass --api-key-file FILE (or "
                      "--api-key, SFUMATO_API_KEY), or --no-auth to serve everybody",
                      params->host),
                 out);
    }
    *out = a;
    return STATUS_OK;
out:
    access_free(a);
    return status;
}

void access_free(struct access *a) {
    if (!a) return;
    free(a->digests);
    free(a);
}
