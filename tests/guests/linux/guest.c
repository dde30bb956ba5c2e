/*
 * What a test guest does besides booting, in one static binary.
 *
 *     guest heartbeat PORT               a numbered line every millisecond
 *     guest disk DEVICE RATE REPORT      writes and verifies blocks for ever
 *     guest stream PORT RATE REPORT      numbered lines out, numbered lines in
 *     guest cpuid                        CPUID of each processor, as text
 *     guest dirty DEVICE MIB             writes that reach the host, and no flush
 *     guest cache FILE MIB               writes that stay in the guest's page cache
 *     guest churn MIB                    rewrites that much memory for ever, and verifies it
 *     guest cdrom DEVICE                 whether its tray is open, or what is in it
 *     guest eject DEVICE                 opens its tray, as eject(1) does
 *
 * README.md beside this file has the format of each line.
 *
 * Block format of `disk`, version 1: 4096 bytes, little endian.
 *
 *     0   8  "SEGUEBL1"
 *     8   8  sequence number, from 0; the block lies at (sequence % count) * 4096
 *     16  8  seed: drawn at random at each start, so that blocks of an earlier run show
 *     24  8  count: how many blocks there are before the sequence wraps around
 *     32  4  zero
 *     36  4  CRC-32 (zlib's) of the whole block, taken with this field zero
 *     40     pseudo-random bytes
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/cdrom.h>
#include <linux/fs.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, MIB = 1 << 20, MAX_BLOCKS = 64 * MIB / BLOCK, FLUSH_EVERY = 256 };
static const int64_t SECOND = 1000000000, MILLISECOND = 1000000;

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "guest: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t draw(void)
{
    uint64_t number;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        die("getrandom");
    return number;
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static void sleep_until(int64_t when)
{
    struct timespec t = { when / SECOND, when % SECOND };
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

/* A pace of so many a second; 0 is as fast as it goes. Absolute times, so that nothing drifts. */
struct pace { int64_t next, period; };

static struct pace pace_of(long rate)
{
    return (struct pace){ now(), rate ? SECOND / rate : 0 };
}

static void keep(struct pace *pace)
{
    if (!pace->period)
        return;
    pace->next += pace->period;
    /* Who fell far behind (an overloaded host) goes on from here: catching up would never end. */
    int64_t behind = now() - pace->next;
    if (behind > SECOND / 10)
        pace->next += behind;
    sleep_until(pace->next);
}

/* Ahead of whatever else the guest does, so that a busy disk never looks like a lost beat. */
static void prefer(int priority)
{
    struct sched_param p = { .sched_priority = priority };
    sched_setscheduler(0, SCHED_FIFO, &p);
}

/* Drivers find their devices a while after they were loaded. */
static int open_in_time(const char *path, int flags)
{
    int fd = -1;
    for (int i = 0; i < 1000 && (fd = open(path, flags)) < 0; i++)
        sleep_until(now() + 10 * MILLISECOND);
    return fd;
}

/* Opens a virtio port, or a terminal, which it makes raw. */
static int open_port(const char *path, int flags)
{
    int fd = open_in_time(path, flags | O_NOCTTY);
    if (fd < 0)
        die(path);
    struct termios t;
    if (tcgetattr(fd, &t) == 0) {
        cfmakeraw(&t);
        t.c_cflag |= CLOCAL | CREAD;
        tcsetattr(fd, TCSANOW, &t);
    }
    return fd;
}

static void write_all(int fd, const char *text, size_t length)
{
    while (length) {
        ssize_t n = write(fd, text, length);
        if (n < 0 && errno != EINTR && errno != EAGAIN)
            die("write");
        if (n < 0)
            n = 0;
        text += n;
        length -= n;
    }
}

/* One write a line: lines of several writers on one terminal do not mix. */
static void __attribute__((format(printf, 2, 3))) say(int fd, const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    write_all(fd, line, length);
}

static void heartbeat(char **argument)
{
    int port = open_port(argument[0], O_WRONLY);
    uint64_t nonce = draw();
    mlockall(MCL_CURRENT | MCL_FUTURE);
    prefer(50);
    struct pace pace = pace_of(1000);
    for (uint64_t n = 0;; n++) {
        if (n % 1000 == 0)
            say(port, "nonce %016" PRIx64 "\n", nonce);
        say(port, "hb %" PRIu64 " %" PRId64 "\n", n, now());
        keep(&pace);
    }
}

/* ---- disk ---------------------------------------------------------------------------------- */

struct block {
    char magic[8];
    uint64_t sequence, seed, count;
    uint32_t zero, crc;
    uint64_t payload[(BLOCK - 40) / 8];
};
_Static_assert(sizeof(struct block) == BLOCK, "a block has no holes");

/* What the worker tells the reporter; in memory that both map. */
struct progress {
    _Atomic uint64_t written; /* blocks that the device acknowledged */
    _Atomic bool bad;
    char reason[160];
};

static uint32_t crc_table[256];

static void make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320 ^ c >> 1 : c >> 1;
        crc_table[i] = c;
    }
}

static uint32_t crc_of(const struct block *block)
{
    const uint8_t *byte = (const uint8_t *)block;
    uint32_t c = ~0u;
    for (size_t i = 0; i < BLOCK; i++) {
        uint8_t value = i >= 36 && i < 40 ? 0 : byte[i];
        c = crc_table[(c ^ value) & 255] ^ c >> 8;
    }
    return ~c;
}

static uint64_t scramble(uint64_t *state) /* splitmix64, public domain */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void fail(struct progress *progress, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(progress->reason, sizeof progress->reason, format, arguments);
    va_end(arguments);
    progress->bad = true;
    exit(1);
}

static void write_and_verify(const char *device, long rate, struct progress *progress)
{
    int fd = open_in_time(device, O_RDWR | O_DIRECT);
    uint64_t size = 0;
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) < 0)
        fail(progress, "cannot open: %s", strerror(errno));
    uint64_t count = size / BLOCK < MAX_BLOCKS ? size / BLOCK : MAX_BLOCKS;
    struct block *block = aligned_alloc(BLOCK, 2 * BLOCK), *back = block + 1;
    uint64_t seed = draw(), state = seed;
    make_crc_table();

    struct pace pace = pace_of(rate);
    for (uint64_t n = 0;; n++) {
        *block = (struct block){ .sequence = n, .seed = seed, .count = count };
        memcpy(block->magic, "SEGUEBL1", 8);
        for (size_t i = 0; i < sizeof block->payload / 8; i++)
            block->payload[i] = scramble(&state);
        block->crc = crc_of(block);
        if (pwrite(fd, block, BLOCK, n % count * BLOCK) != BLOCK)
            fail(progress, "write of %" PRIu64 ": %s", n, strerror(errno));
        progress->written = n + 1;
        if (n % FLUSH_EVERY == FLUSH_EVERY - 1 && fdatasync(fd) < 0)
            fail(progress, "flush after %" PRIu64 ": %s", n, strerror(errno));

        uint64_t kept = n + 1 < count ? n + 1 : count;
        uint64_t earlier = n - scramble(&state) % kept;
        if (pread(fd, back, BLOCK, earlier % count * BLOCK) != BLOCK)
            fail(progress, "read of %" PRIu64 ": %s", earlier, strerror(errno));
        if (memcmp(back->magic, "SEGUEBL1", 8) || back->seed != seed || back->sequence != earlier)
            fail(progress, "expected block %" PRIu64 ", found %" PRIu64 " of seed %016" PRIx64,
                 earlier, back->sequence, back->seed);
        if (crc_of(back) != back->crc)
            fail(progress, "checksum of block %" PRIu64, earlier);
        keep(&pace);
    }
}

static void disk(char **argument)
{
    const char *device = argument[0];
    /* Seen from another process: a worker that is stuck in a write cannot report it. */
    struct progress *progress = mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE,
                                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (progress == MAP_FAILED)
        die("mmap");
    int report = open_port(argument[2], O_WRONLY);
    if (fork() == 0)
        write_and_verify(device, atol(argument[1]), progress);
    prefer(30);
    struct pace pace = pace_of(2);
    uint64_t last = 0;
    for (int still = 0;;) {
        keep(&pace);
        uint64_t written = progress->written;
        if (progress->bad) {
            say(report, "disk %s BAD %" PRIu64 " %s\n", device, written, progress->reason);
            sleep_until(now() + SECOND);
        } else if (written != last) {
            say(report, "disk %s %" PRIu64 " ok\n", device, written);
            still = 0;
        } else if (++still % 10 == 0) {
            say(report, "disk %s BAD %" PRIu64 " no progress for %d s\n", device, written,
                still / 2);
        }
        last = written;
    }
}

/* ---- stream -------------------------------------------------------------------------------- */

static void read_numbers(int port, int report, const char *name)
{
    char buffer[4096], line[64];
    size_t length = 0;
    uint64_t expected = 0;
    int64_t told = now();
    uint64_t told_about = 0;
    prefer(40);
    for (;;) {
        struct pollfd p = { port, POLLIN, 0 };
        int ready = poll(&p, 1, 500);
        ssize_t n = ready > 0 ? read(port, buffer, sizeof buffer) : 0;
        if (ready > 0 && n <= 0) /* a virtio port whose other side is closed */
            sleep_until(now() + 10 * MILLISECOND);
        for (ssize_t i = 0; i < n; i++) {
            if (buffer[i] != '\n') {
                if (length < sizeof line - 1)
                    line[length++] = buffer[i];
                continue;
            }
            line[length] = 0;
            length = 0;
            uint64_t got;
            char after;
            if (sscanf(line, "in %" SCNu64 "%c", &got, &after) != 1) {
                say(report, "stream %s in-BAD expected %" PRIu64 " got '%s'\n", name, expected,
                    line);
                continue;
            }
            if (got != expected)
                say(report, "stream %s in-BAD expected %" PRIu64 " got %" PRIu64 "\n", name,
                    expected, got);
            expected = got + 1;
        }
        if (expected != told_about && now() - told > SECOND / 2) {
            say(report, "stream %s in-ok %" PRIu64 "\n", name, expected - 1);
            told_about = expected;
            told = now();
        }
    }
}

static void stream(char **argument)
{
    int port = open_port(argument[0], O_RDWR), report = open_port(argument[2], O_WRONLY);
    if (fork() == 0)
        read_numbers(port, report, argument[0]);
    struct pace pace = pace_of(atol(argument[1]));
    for (uint64_t n = 0;; n++) {
        say(port, "out %" PRIu64 "\n", n);
        keep(&pace);
    }
}

/* ---- cpuid --------------------------------------------------------------------------------- */

/* How many subleaves a leaf has, as far as the first one tells; each look at one is a trap to the
 * hypervisor, and a hypervisor that is itself a guest takes its time over it. */
static uint32_t subleaves(uint32_t leaf, const uint32_t first[4])
{
    switch (leaf) {
    case 0x7: case 0x14: case 0x17: case 0x18: case 0x1d: case 0x20: case 0x23: case 0x24:
        return first[0] + 1; /* EAX of subleaf 0 is the last one's number */
    case 0x4: case 0xb: case 0xd: case 0xf: case 0x10: case 0x12: case 0x1b: case 0x1e: case 0x1f:
    case 0x8000001d: case 0x80000020: case 0x80000026:
        return 64;
    default:
        return 1;
    }
}

/* Whether this subleaf says that there is none after it. */
static bool is_end(uint32_t leaf, uint32_t a, uint32_t c)
{
    switch (leaf) {
    case 0x4: case 0x8000001d:
        return !(a & 0x1f); /* no more caches */
    case 0xb: case 0x1f: case 0x80000026:
        return !(c >> 8 & 0xff); /* no more levels of the topology */
    case 0x12: case 0x1b:
        return !(a & 0xf);
    default:
        return false;
    }
}

static void show_leaf(int cpu, uint32_t leaf)
{
    uint32_t first[4], a, b, c, d;
    __cpuid_count(leaf, 0, first[0], first[1], first[2], first[3]);
    uint32_t count = subleaves(leaf, first);
    for (uint32_t sub = 0; sub < count && sub < 64; sub++) {
        __cpuid_count(leaf, sub, a, b, c, d);
        if (!sub || a | b | c | d)
            printf("cpuid %d %08x.%x %08x %08x %08x %08x\n", cpu, leaf, sub, a, b, c, d);
        if (is_end(leaf, a, c))
            break;
    }
}

static void cpuid(char **argument)
{
    (void)argument;
    for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_CONF); cpu++) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set) < 0)
            continue;
        const uint32_t bases[] = { 0, 0x40000000, 0x80000000 };
        for (size_t i = 0; i < 3; i++) {
            uint32_t last, b, c, d;
            __cpuid(bases[i], last, b, c, d);
            if (last < bases[i] || last > bases[i] + 0x100)
                last = bases[i];
            for (uint32_t leaf = bases[i]; leaf <= last; leaf++)
                show_leaf(cpu, leaf);
        }
    }
    puts("cpuid end");
}

/* ---- load ---------------------------------------------------------------------------------- */

static void fill(const char *path, int flags, long mib)
{
    int fd = open(path, O_WRONLY | flags, 0600);
    uint64_t *data = aligned_alloc(BLOCK, MIB);
    if (fd < 0 || !data)
        die(path);
    uint64_t state = draw();
    for (long n = 0; n < mib; n++) {
        for (size_t i = 0; i < MIB / 8; i += 64) /* no two blocks alike: nothing to compress */
            data[i] = scramble(&state);
        for (ssize_t done = 0, now_done; done < MIB; done += now_done)
            if ((now_done = write(fd, (char *)data + done, MIB - done)) <= 0)
                die(path);
    }
    printf("wrote %ld MiB\n", mib);
}

static void dirty(char **argument)
{
    fill(argument[0], O_DIRECT, atol(argument[1]));
}

static void cache(char **argument)
{
    fill(argument[0], O_CREAT, atol(argument[1]));
}

static void churn(char **argument)
{
    size_t words = (size_t)atol(argument[0]) * MIB / 8, step = BLOCK / 8;
    uint64_t *memory = mmap(NULL, words * 8, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    for (uint64_t round = 1;; round++) {
        for (size_t i = 0; i < words; i += step) {
            if (memory[i] != (round == 1 ? 0 : (round - 1) ^ i)) {
                printf("churn BAD round %" PRIu64 " page %zu\n", round, i / step);
                exit(1);
            }
            memory[i] = round ^ i;
        }
    }
}

static int cdrom_ioctl(const char *device, unsigned long request, int argument)
{
    int fd = open(device, O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        die(device);
    int result = ioctl(fd, request, argument);
    if (result < 0)
        die(device);
    close(fd);
    return result;
}

static void cdrom(char **argument)
{
    static const char *const states[] = { "unknown", "empty", "open", "not ready", "loaded" };
    printf("cdrom %s\n", states[cdrom_ioctl(argument[0], CDROM_DRIVE_STATUS, CDSL_CURRENT)]);
}

static void eject(char **argument)
{
    cdrom_ioctl(argument[0], CDROM_LOCKDOOR, 0);
    cdrom_ioctl(argument[0], CDROMEJECT, 0);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; int arguments; void (*run)(char **); } commands[] = {
        { "heartbeat", 1, heartbeat }, { "disk", 3, disk },   { "stream", 3, stream },
        { "cpuid", 0, cpuid },         { "dirty", 2, dirty }, { "cache", 2, cache },
        { "churn", 1, churn },         { "cdrom", 1, cdrom }, { "eject", 1, eject },
    };
    for (size_t i = 0; argc > 1 && i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[1], commands[i].name) && argc - 2 == commands[i].arguments) {
            commands[i].run(argv + 2);
            return 0;
        }
    fprintf(stderr, "guest: see README.md for what it can do\n");
    return 2;
}
