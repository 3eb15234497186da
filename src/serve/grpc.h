/* grpc.h: the gRPC protocol in front of the service: a row for the table of fronts in net.c.
 *
 *   h2 (streams) ─► grpc.c (methods, access, errors) ─► grpc_sfumato.c, grpc_vllm.c, grpc_health.c
 *
 * Off unless --grpc-port is given. protobuf-c stays behind grpc_parts.h.
 */
#ifndef SFUMATO_SERVE_GRPC_H
#define SFUMATO_SERVE_GRPC_H

#include "serve/net.h"

extern const struct front grpc_front;
/* All methods and "other", joined by '|', for metrics_new. Static. */
const char *grpc_methods(void);

#endif
