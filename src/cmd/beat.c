/* beat.c: see beat.h.
 *
 * Which network leads to rank 0 is unknown, so a rank tries all addresses of rank 0's host until one
 * answers, and from then on those that have answered: of two networks either may fail. The index
 * travels with the datagram, because an answer may leave rank 0's host with another source address
 * than the one it was sent to.
 */
#include "cmd/beat.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"

enum { ADDRESSES_MAX = 16, HEARD_AT_ONCE = 4096, WARN_LOOKS = 30 };

struct datagram {
    unsigned char token[16];
    uint8_t rank, address;
};

/* Rank 0's, as every rank knows it. port 0: there are no beats. */
struct meeting {
    unsigned char token[16];
    in_port_t port; /* this and the addresses as they travel */
    int32_t address_count;
    struct in_addr addresses[ADDRESSES_MAX];
};

static struct {
    _Atomic bool running; /* all below is there */
    int socket, rank;
    bool is_lead; /* of its host: speaks for it */
    struct meeting meeting;
    uint32_t answered; /* bit i: address i has */
    int looks;
    int partner_count, partners[COMM_RANKS_MAX]; /* whom this rank listens to */
    struct {
        bool ever;
        int silent_looks;
    } heard[COMM_RANKS_MAX];
} beat;

static void list_addresses(struct meeting *m) {
    struct ifaddrs *all;
    if (getifaddrs(&all) != 0) return;
    for (const struct ifaddrs *a = all; a && m->address_count < ADDRESSES_MAX; a = a->ifa_next) {
        if (!a->ifa_addr || a->ifa_addr->sa_family != AF_INET) continue;
        if (!(a->ifa_flags & IFF_UP) || (a->ifa_flags & IFF_LOOPBACK)) continue;
        const struct sockaddr_in *in = (const void *)a->ifa_addr;
        m->addresses[m->address_count++] = in->sin_addr;
    }
    freeifaddrs(all);
}

/* False: there is no socket to be had. Bound by rank 0; the others get a port with the first send. */
static bool open_socket(void) {
    beat.socket = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return beat.socket >= 0;
}

static void invite(struct meeting *m) {
    struct sockaddr_in own = {.sin_family = AF_INET};
    socklen_t n = sizeof own;
    if (getrandom(m->token, sizeof m->token, 0) != (ssize_t)sizeof m->token) return;
    if (!open_socket() || bind(beat.socket, (const void *)&own, n) != 0) return;
    if (getsockname(beat.socket, (void *)&own, &n) != 0) return;
    list_addresses(m);
    m->port = own.sin_port;
}

void beat_join(comm *c) {
    const int size = comm_size(c);
    if (comm_local_size(c) == size) return; /* comm_local_size: on one host so on all ranks */
    beat.rank = comm_rank(c);
    beat.is_lead = comm_host_of(c, beat.rank) == beat.rank;
    for (int r = 0; r < size; r++) {
        const bool listens = beat.rank == 0 || (r == 0 && comm_host_of(c, beat.rank) != 0);
        if (listens && comm_host_of(c, r) != comm_host_of(c, beat.rank))
            beat.partners[beat.partner_count++] = r;
    }
    if (beat.rank == 0) invite(&beat.meeting);
    comm_share(c, &beat.meeting, sizeof beat.meeting);
    if (beat.rank > 0 && beat.meeting.port != 0 && !open_socket()) beat.meeting.port = 0;
    if (beat.meeting.port == 0) {
        if (beat.is_lead) log_warn("no socket for signs of life between hosts");
        return;
    }
    atomic_store(&beat.running, beat.partner_count > 0);
}

static void send_beat(const struct sockaddr_in *to, int address) {
    struct datagram d = {.rank = (uint8_t)beat.rank, .address = (uint8_t)address};
    memcpy(d.token, beat.meeting.token, sizeof d.token);
    /* what does not go out is missed on the other side: that is the point */
    (void)!sendto(beat.socket, &d, sizeof d, 0, (const void *)to, sizeof *to);
}

static void hear(void) {
    struct datagram d;
    struct sockaddr_in from;
    for (int i = 0; i < HEARD_AT_ONCE; i++) {
        socklen_t n = sizeof from;
        /* one byte more than there may be would be cut off: MSG_TRUNC gives the true length */
        const ssize_t got = recvfrom(beat.socket, &d, sizeof d, MSG_TRUNC, (void *)&from, &n);
        if (got < 0) return; /* nothing more, or the word that nobody listens there: silence */
        if (got != sizeof d || memcmp(d.token, beat.meeting.token, sizeof d.token) != 0) continue;
        for (int p = 0; p < beat.partner_count; p++) {
            if (beat.partners[p] != d.rank) continue;
            beat.heard[d.rank].ever = true;
            beat.heard[d.rank].silent_looks = 0;
            if (beat.rank == 0) send_beat(&from, d.address);
            if (beat.rank > 0 && d.address < ADDRESSES_MAX) beat.answered |= 1u << d.address;
        }
    }
}

static void warn_of_silence(void) {
    char text[ADDRESSES_MAX * (INET_ADDRSTRLEN + 1) + 1] = "";
    for (int i = 0; i < beat.meeting.address_count; i++) {
        char one[INET_ADDRSTRLEN];
        const size_t at = strlen(text);
        inet_ntop(AF_INET, &beat.meeting.addresses[i], one, sizeof one);
        snprintf(text + at, sizeof text - at, "%s%s", at ? " " : "", one);
    }
    log_warn(
        "rank 0 does not answer at UDP port %d of %s: signs of life between hosts are off, so that "
        "a host that is lost is found by the next step only; is there a firewall?",
        ntohs(beat.meeting.port), text);
}

void beat_look(void) {
    if (!atomic_load(&beat.running)) return;
    beat.looks++;
    for (int p = 0; p < beat.partner_count; p++) beat.heard[beat.partners[p]].silent_looks++;
    hear();
    if (beat.rank == 0) return; /* it answers */
    for (int i = 0; i < beat.meeting.address_count; i++) {
        const struct sockaddr_in to = {.sin_family = AF_INET,
                                       .sin_port = beat.meeting.port,
                                       .sin_addr = beat.meeting.addresses[i]};
        if (!beat.answered || beat.answered >> i & 1) send_beat(&to, i);
    }
    if (beat.looks == WARN_LOOKS && !beat.answered && beat.is_lead) warn_of_silence();
}

int beat_silent_looks(int rank) {
    return beat.heard[rank].ever ? beat.heard[rank].silent_looks : 0;
}
