/* The chat server of the benchmarks: one thread and epoll, so that it is not the bottleneck. Linux only.
 *
 *     echo_server echo        sends every byte back
 *     echo_server delay MS    answers each line exactly MS milliseconds after its last byte was read
 *     echo_server room MS     sends each line to all connections; its sender's own comes last, MS milliseconds later
 *     echo_server drop N      as echo, but closes a connection after N lines
 *
 * It listens on a free port of 127.0.0.1, which is the first line on its standard output. Each line on its standard
 * input is answered with one line of JSON, and the end of the input ends it (so it never outlives who started it):
 *
 *     accepted   connections since the start
 *     open       connections now
 *     active     connections that have sent a line since the previous question
 *     lines      lines read since the start
 *     late_us    mean lateness of the answers of delay and room since the start, in microseconds
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum mode { ECHO, DELAY, ROOM, DROP };

struct buffer {
    char *bytes;
    size_t length, capacity;
};

struct connection {
    long serial; /* tells it from an earlier connection with the same file number */
    long lines, question;
    struct buffer input;  /* the beginning of a line */
    struct buffer output; /* what the kernel has not taken yet */
};

struct answer { /* an element of the queue, which is in the order of the due times, as the delay is the same for all */
    struct answer *next;
    long long due;
    int file;
    long serial;
    size_t length;
    char bytes[];
};

static enum mode mode;
static long argument; /* milliseconds or lines */
static struct connection **connections; /* by file number */
static int limit, highest, poller, alarm_clock;
static struct answer *first, *last;
static long accepted, open_now, active, lines, question = 1, answers;
static double late; /* nanoseconds, of all answers */

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void append(struct buffer *buffer, const char *bytes, size_t length) {
    if (buffer->length + length > buffer->capacity) {
        buffer->capacity = 2 * (buffer->length + length);
        buffer->bytes = realloc(buffer->bytes, buffer->capacity);
        if (!buffer->bytes)
            abort();
    }
    memcpy(buffer->bytes + buffer->length, bytes, length);
    buffer->length += length;
}

static void hang_up(int file) {
    struct connection *connection = connections[file];
    free(connection->input.bytes);
    free(connection->output.bytes);
    free(connection);
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
    struct buffer *output = &connections[file]->output;
    ssize_t sent = 0;
    if (!output->length)
        sent = send(file, bytes, length, MSG_NOSIGNAL);
    if (sent < 0)
        sent = 0;
    if ((size_t)sent < length) {
        append(output, bytes + sent, length - sent);
        watch(file, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

static void on_writable(int file) {
    struct buffer *output = &connections[file]->output;
    ssize_t sent = send(file, output->bytes, output->length, MSG_NOSIGNAL);
    if (sent > 0)
        memmove(output->bytes, output->bytes + sent, output->length -= sent);
    if (!output->length || (sent < 0 && errno != EAGAIN)) {
        output->length = 0;
        watch(file, EPOLL_CTL_MOD, EPOLLIN);
    }
}

static void set_alarm(void) {
    struct itimerspec at = {.it_value = {first->due / 1000000000, first->due % 1000000000}};
    timerfd_settime(alarm_clock, TFD_TIMER_ABSTIME, &at, NULL);
}

static void answer_later(int file, const char *bytes, size_t length, long long due) {
    struct answer *answer = malloc(sizeof *answer + length);
    if (!answer)
        abort();
    *answer = (struct answer){.due = due, .file = file, .serial = connections[file]->serial, .length = length};
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

static void on_line(int file, const char *bytes, size_t length, long long arrived) {
    if (mode == ROOM)
        for (int other = 0; other <= highest; other++)
            if (connections[other] && other != file)
                deliver(other, bytes, length);
    if (argument)
        answer_later(file, bytes, length, arrived + argument * 1000000LL);
    else
        deliver(file, bytes, length);
}

static void on_readable(int file) {
    static char bytes[65536];
    struct connection *connection = connections[file];
    ssize_t length = recv(file, bytes, sizeof bytes, 0);
    if (length <= 0) {
        if (length == 0 || errno != EAGAIN)
            hang_up(file);
        return;
    }
    long long arrived = mode == ECHO ? 0 : now();
    const char *start = bytes, *end = bytes + length, *newline;
    while ((newline = memchr(start, '\n', end - start))) {
        lines++;
        connection->lines++;
        if (connection->question != question) {
            connection->question = question;
            active++;
        }
        if (mode == DELAY || mode == ROOM) {
            append(&connection->input, start, newline + 1 - start);
            on_line(file, connection->input.bytes, connection->input.length, arrived);
            connection->input.length = 0;
        }
        start = newline + 1;
        if (mode == DROP && connection->lines == argument) {
            deliver(file, bytes, start - bytes);
            hang_up(file);
            return;
        }
    }
    if (mode == DELAY || mode == ROOM)
        append(&connection->input, start, end - start);
    else
        deliver(file, bytes, length);
}

static void on_connection(int listener) {
    int file = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
    if (file < 0)
        return;
    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!(connections[file] = calloc(1, sizeof(struct connection))))
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

static void raise_file_limit(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    struct rlimit more = {100000, files.rlim_max > 100000 ? files.rlim_max : 100000};
    if (setrlimit(RLIMIT_NOFILE, &more)) { /* only root may go over the hard limit */
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    getrlimit(RLIMIT_NOFILE, &files);
    limit = files.rlim_cur < 1000000 ? (int)files.rlim_cur : 1000000;
}

int main(int count, char **arguments) {
    const char *names[] = {"echo", "delay", "room", "drop"};
    for (mode = ECHO; mode <= DROP && (count < 2 || strcmp(names[mode], arguments[1])); mode++)
        ;
    argument = count > 2 ? atol(arguments[2]) : 0;
    if (mode > DROP || argument < 0) {
        fprintf(stderr, "usage: echo_server echo | delay MS | room MS | drop N\n");
        return 2;
    }
    raise_file_limit();
    connections = calloc(limit, sizeof *connections);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (!connections || bind(listener, (struct sockaddr *)&address, size) || listen(listener, 65535) ||
        getsockname(listener, (struct sockaddr *)&address, &size)) {
        perror("echo_server");
        return 1;
    }
    poller = epoll_create1(0);
    alarm_clock = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch(listener, EPOLL_CTL_ADD, EPOLLIN);
    watch(alarm_clock, EPOLL_CTL_ADD, EPOLLIN);
    watch(0, EPOLL_CTL_ADD, EPOLLIN);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event events[256];
        int ready = epoll_wait(poller, events, 256, -1);
        for (int number = 0; number < ready; number++) {
            int file = events[number].data.fd;
            if (file == listener)
                on_connection(listener);
            else if (file == alarm_clock)
                on_alarm();
            else if (file == 0)
                on_question();
            else if (connections[file]) {
                if (events[number].events & EPOLLOUT)
                    on_writable(file);
                if (events[number].events & ~EPOLLOUT)
                    on_readable(file);
            }
        }
    }
}
