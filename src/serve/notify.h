/* notify.h: tells a supervisor (systemd, Type=notify) that the service is ready or stopping. */
#ifndef SFUMATO_SERVE_NOTIFY_H
#define SFUMATO_SERVE_NOTIFY_H

/* "READY=1", "STOPPING=1": one datagram to NOTIFY_SOCKET; nothing when it is not set. */
void notify_supervisor(const char *state);

#endif
