/* The chat server of the benchmarks: one thread and epoll, so that it is not the bottleneck. Linux only.
 *
 *     echo_server [delay=MS] [room=1] [drop=N] [stall=MS] [port=N]
 *
 * It sends every byte back, at once, unless told otherwise:
 *
 *     delay=MS   what was read is sent back exactly MS milliseconds later
 *     room=1     what was read goes to all other connections first, so that everybody's echo takes as long; each read is
 *                taken for whole lines
 *     drop=N     a connection is closed after N lines
 *     stall=MS   nothing is done for the first MS milliseconds of every 2 x MS
 *     port=N     where to listen, instead of on a free port; several servers may share one
 *
 * The port, on 127.0.0.1, is the first line on its standard output. Each line on its standard input is answered with
 * one line of JSON, and the end of the input ends it, so that it never outlives who started it:
 *
 *     accepted   connections since the start
 *     open       connections now
 *     active     connections that have sent a line since the previous question
 *     lines      lines read since the start
 *     late_us    mean lateness of the delayed answers since the start, in microseconds
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

struct connection {
    long serial; /* tells it from an earlier connection with the same file number */
    long lines, question;
    char *unsent; /* what the kernel has not taken yet */
    size_t length, capacity;
};

struct answer { /* an element of the queue, which is in the order of the due times, as all have the same delay */
    struct answer *next;
    long long due;
    int file;
    long serial;
    size_t length;
    char bytes[];
};

static long delay, room, drop, stall, port;
static struct connection **connections; /* by file number */
static int highest, poller, alarm_clock;
static struct answer *first, *last;
static long accepted, open_now, active, lines, question = 1, answers;
static double late; /* nanoseconds, of all delayed answers */

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void keep(struct connection *connection, const char *bytes, size_t length) {
    if (connection->length + length > connection->capacity) {
        connection->capacity = 2 * (connection->length + length);
        connection->unsent = realloc(connection->unsent, connection->capacity);
        if (!connection->unsent)
            abort();
    }
    memcpy(connection->unsent + connection->length, bytes, length);
    connection->length += length;
}

static void hang_up(int file) {
    free(connections[file]->unsent);
    free(connections[file]);
    connections[file] = NULL;
    open_now--;
    close(file);
}

static void watch(int file, int operation, unsigned events) {
    struct epoll_event event = {.events = events, .data.fd = file};
    epoll_ctl(poller, operation, file, &event);
}

/* Send, or keep what the kernel does not take. A broken connection is found and closed when it is read. */
static void deliver(int file, const char *bytes, size_t length) {
    struct connection *connection = connections[file];
    ssize_t sent = 0;
    if (!connection->length)
        sent = send(file, bytes, length, MSG_NOSIGNAL);
    if (sent < 0)
        sent = 0;
    if ((size_t)sent < length) {
        keep(connection, bytes + sent, length - sent);
        watch(file, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

static void on_writable(int file) {
    struct connection *connection = connections[file];
    ssize_t sent = send(file, connection->unsent, connection->length, MSG_NOSIGNAL);
    if (sent > 0)
        memmove(connection->unsent, connection->unsent + sent, connection->length -= sent);
    if (!connection->length || (sent < 0 && errno != EAGAIN)) {
        connection->length = 0;
        watch(file, EPOLL_CTL_MOD, EPOLLIN);
    }
}

static void set_alarm(void) {
    struct itimerspec at = {.it_value = {first->due / 1000000000, first->due % 1000000000}};
    timerfd_settime(alarm_clock, TFD_TIMER_ABSTIME, &at, NULL);
}

static void answer_later(int file, const char *bytes, size_t length) {
    struct answer *answer = malloc(sizeof *answer + length);
    if (!answer)
        abort();
    *answer = (struct answer){.file = file, .serial = connections[file]->serial, .length = length};
    answer->due = now() + delay * 1000000LL;
    memcpy(answer->bytes, bytes, length);
    if (first) {
        last = last->next = answer;
    } else {
        first = last = answer;
        set_alarm();
    }
}

static void on_alarm(void) {
    unsigned long long times;
    if (read(alarm_clock, &times, sizeof times) < 0)
        return;
    while (first && first->due <= now()) {
        struct answer *answer = first;
        late += now() - answer->due;
        answers++;
        struct connection *connection = connections[answer->file];
        if (connection && connection->serial == answer->serial)
            deliver(answer->file, answer->bytes, answer->length);
        first = answer->next;
        free(answer);
    }
    if (first)
        set_alarm();
}

static void count_lines(struct connection *connection, const char *bytes, size_t length) {
    const char *end = bytes + length;
    while ((bytes = memchr(bytes, '\n', end - bytes))) {
        bytes++;
        lines++;
        connection->lines++;
    }
    if (connection->question != question) {
        connection->question = question;
        active++;
    }
}

static void on_readable(int file) {
    static char bytes[65536];
    ssize_t length = recv(file, bytes, sizeof bytes, 0);
    if (length < 0 && errno == EAGAIN)
        return;
    if (length <= 0) {
        hang_up(file);
        return;
    }
    if (room)
        for (int other = 0; other <= highest; other++)
            if (connections[other] && other != file)
                deliver(other, bytes, length);
    if (delay)
        answer_later(file, bytes, length);
    else
        deliver(file, bytes, length);
    count_lines(connections[file], bytes, length);
    if (drop && connections[file]->lines >= drop)
        hang_up(file);
}

static void on_connection(int listener) {
    int file = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
    if (file < 0)
        return;
    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    connections[file] = calloc(1, sizeof(struct connection));
    if (!connections[file])
        abort();
    connections[file]->serial = ++accepted;
    open_now++;
    if (file > highest)
        highest = file;
    watch(file, EPOLL_CTL_ADD, EPOLLIN);
}

static void on_question(void) {
    char ignored[256];
    if (read(0, ignored, sizeof ignored) <= 0)
        exit(0);
    printf("{\"accepted\": %ld, \"open\": %ld, \"active\": %ld, \"lines\": %ld, \"late_us\": %.1f}\n", accepted, open_now,
           active, lines, answers ? late / answers / 1000 : 0.0);
    fflush(stdout);
    active = 0;
    question++;
}

static void stand_still(void) {
    long long left = stall * 1000000LL - now() % (2 * stall * 1000000LL);
    struct timespec time = {left / 1000000000, left % 1000000000};
    if (left > 0)
        nanosleep(&time, NULL);
}

static void on_event(int listener, struct epoll_event event) {
    int file = event.data.fd;
    if (file == listener)
        on_connection(listener);
    else if (file == alarm_clock)
        on_alarm();
    else if (file == 0)
        on_question();
    else if (connections[file]) {
        if (event.events & EPOLLOUT)
            on_writable(file);
        if (event.events & ~EPOLLOUT)
            on_readable(file);
    }
}

static int understand(char *argument) {
    struct {
        const char *name;
        long *value;
    } known[] = {{"delay=", &delay}, {"room=", &room}, {"drop=", &drop}, {"stall=", &stall}, {"port=", &port}};
    for (size_t number = 0; number < sizeof known / sizeof *known; number++) {
        size_t length = strlen(known[number].name);
        if (!strncmp(argument, known[number].name, length)) {
            *known[number].value = atol(argument + length);
            return 1;
        }
    }
    return 0;
}

static int listen_on_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 65535) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("echo_server");
        exit(1);
    }
    port = ntohs(address.sin_port);
    return listener;
}

int main(int count, char **arguments) {
    for (int number = 1; number < count; number++)
        if (!understand(arguments[number])) {
            fprintf(stderr, "usage: echo_server [delay=MS] [room=1] [drop=N] [stall=MS] [port=N]\n");
            return 2;
        }
    struct rlimit files; /* whoever starts it has raised the limit */
    getrlimit(RLIMIT_NOFILE, &files);
    connections = calloc(files.rlim_cur < 1000000 ? files.rlim_cur : 1000000, sizeof *connections);
    if (!connections)
        abort();
    int listener = listen_on_port();
    poller = epoll_create1(0);
    alarm_clock = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch(listener, EPOLL_CTL_ADD, EPOLLIN);
    watch(alarm_clock, EPOLL_CTL_ADD, EPOLLIN);
    watch(0, EPOLL_CTL_ADD, EPOLLIN);
    printf("%ld\n", port);
    fflush(stdout);
    for (;;) {
        struct epoll_event events[256];
        int ready = epoll_wait(poller, events, 256, -1);
        if (stall)
            stand_still();
        for (int number = 0; number < ready; number++)
            on_event(listener, events[number]);
    }
}
