/* A paced closed loop in C, for the latency comparison: what the machine itself adds to a round trip. Linux only.
 *
 *     client PORT CONNECTIONS RATE SECONDS < MESSAGES
 *
 * Opens CONNECTIONS to 127.0.0.1. RATE times a second the next of them, in turn, sends a random line of the standard
 * input; one that still waits for its echo is passed over. The round trip is taken as the Locust scripts take it: from
 * just before the send until the last byte of the echo was read. Its first second is not counted. Prints JSON: the
 * number of messages counted and sent, and the minimum, median, 95th and 99th percentile in milliseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGES = 1000 };

static double seconds_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int by_size(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static int connected(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int file = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (connect(file, (struct sockaddr *)&address, sizeof address)) {
        perror("connect");
        exit(1);
    }
    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return file;
}

int main(int count, char **arguments) {
    if (count != 5) {
        fprintf(stderr, "usage: client PORT CONNECTIONS RATE SECONDS < MESSAGES\n");
        return 2;
    }
    int port = atoi(arguments[1]), connections = atoi(arguments[2]);
    double rate = atof(arguments[3]), seconds = atof(arguments[4]);
    static char *messages[MESSAGES];
    static size_t lengths[MESSAGES];
    int known = 0;
    for (size_t capacity = 0; known < MESSAGES; known++) {
        ssize_t length = getline(&messages[known], &capacity, stdin);
        if (length < 0)
            break;
        lengths[known] = length;
        capacity = 0;
    }
    if (!known)
        return 2;
    int *files = calloc(connections, sizeof *files);
    double *sent_at = calloc(connections, sizeof *sent_at); /* 0: no message in flight */
    double *round_trips = calloc((size_t)(rate * (seconds + 1)), sizeof *round_trips);
    int poller = epoll_create1(0), alarm_clock = timerfd_create(CLOCK_MONOTONIC, 0);
    for (int number = 0; number < connections; number++) {
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = number};
        files[number] = connected(port);
        epoll_ctl(poller, EPOLL_CTL_ADD, files[number], &event);
    }
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(poller, EPOLL_CTL_ADD, alarm_clock, &event);
    long nanoseconds = 1e9 / rate;
    struct itimerspec every = {{0, nanoseconds}, {0, nanoseconds}};
    timerfd_settime(alarm_clock, 0, &every, NULL);

    long sent = 0, counted = 0, next = 0;
    double start = seconds_now(), time;
    do {
        struct epoll_event events[256];
        int ready = epoll_wait(poller, events, 256, 100);
        for (int number = 0; number < ready; number++) {
            uint32_t which = events[number].data.u32;
            if (which == UINT32_MAX) {
                unsigned long long due = 0;
                if (read(alarm_clock, &due, sizeof due) < 0)
                    continue;
                for (; due; due--, next = (next + 1) % connections) {
                    int message = random() % known;
                    if (sent_at[next])
                        continue;
                    sent_at[next] = seconds_now();
                    if (send(files[next], messages[message], lengths[message], MSG_NOSIGNAL) < 0)
                        return 1;
                    sent++;
                }
            } else {
                char bytes[65536];
                ssize_t length = recv(files[which], bytes, sizeof bytes, 0);
                if (length <= 0)
                    return 1;
                if (bytes[length - 1] != '\n')
                    continue;
                if (sent_at[which] > start + 1)
                    round_trips[counted++] = (seconds_now() - sent_at[which]) * 1000;
                sent_at[which] = 0;
            }
        }
        time = seconds_now();
    } while (time < start + seconds);
    if (!counted)
        return 1;
    qsort(round_trips, counted, sizeof *round_trips, by_size);
    printf("{\"sent\": %ld, \"count\": %ld, \"min\": %.3f, \"median\": %.3f, \"p95\": %.3f, \"p99\": %.3f}\n", sent,
           counted, round_trips[0], round_trips[counted / 2], round_trips[counted * 95 / 100],
           round_trips[counted * 99 / 100]);
    return 0;
}
