/* sha256.h: SHA-256 (FIPS 180-4), for digests of API keys and the hashes of the page's policy. */
#ifndef SFUMATO_BASE_SHA256_H
#define SFUMATO_BASE_SHA256_H

#include <stddef.h>

enum { SHA256_BYTES = 32 };

void sha256(const void *bytes, size_t n, unsigned char digest[SHA256_BYTES]);

#endif
