/* Loaded by LD_PRELOAD: sees every call with which this process changes files under one watched directory.
 *
 *   torture_watch(root, trace)   from now on, append each change with its data to the trace, in global order
 *   torture_rule(...)            kill this process at, or fail, the n-th change that matches
 *   torture_note(data)           put a line of the workload's own (an acknowledgement) into the same order
 *
 * Until torture_watch is called everything passes through. What cannot be followed (a shared writable mapping,
 * an unnamed file) aborts loudly; kernel-side copies are refused, so that callers fall back to write. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum op { NOTE, CREATE, WRITE, TRUNCATE, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYNC, FAILED_SYNC, WRITE_SYNC };
enum action { KILL_BEFORE = 1, KILL_AFTER, KILL_MIDDLE, FAIL, SHORT };

#define PAGE 4096

struct record {
    uint64_t inode;
    int64_t offset;
    uint32_t op, thread;
    uint32_t path, data; /* lengths of the two byte strings that follow */
};

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int trace = -1;

static struct {
    enum action action;
    int op, error;
    long skip, count, fired;
    char pattern[PATH_MAX];
} rule;

/* `REAL(open)(...)` calls the next definition of open. */
#define REAL(name) ((__typeof__(&name))next(#name))

static void *next(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "torture shim: no %s\n", name);
        abort();
    }
    return found;
}

static void give_up(const char *what, const char *path)
{
    fprintf(stderr, "torture shim: %s on %s cannot be followed\n", what, path);
    abort();
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Paths */

static int inside(const char *path)
{
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static const char *relative(const char *path) { return path[root_length] ? path + root_length + 1 : "."; }

static int path_of_fd(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return 1;
}

static int watched_fd(int fd, char *path)
{
    if (!root_length) return 0;
    int kept = errno;
    int yes = path_of_fd(fd, path) && inside(path);
    errno = kept;
    return yes;
}

static int watched_path(int directory, const char *name, char *path)
{
    if (!root_length || !name) return 0;
    int kept = errno;
    char base[PATH_MAX] = "";
    if (name[0] != '/') {
        if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of_fd(directory, base)) base[0] = 0;
        strncat(base, "/", sizeof base - strlen(base) - 1);
    }
    snprintf(path, PATH_MAX, "%.*s%s", (int)(PATH_MAX - 1 - strlen(name)), base, name);
    errno = kept;
    return inside(path);
}

static uint64_t inode_of_fd(int fd)
{
    struct stat is;
    return fstat(fd, &is) ? 0 : is.st_ino;
}

static uint64_t inode_of_path(const char *path)
{
    struct stat is;
    return lstat(path, &is) ? 0 : is.st_ino;
}

/* The trace */

/* `path` is relative; `data` is what was written, or the second path. */
static void record(enum op op, uint64_t inode, int64_t offset, const char *path, const void *data, size_t n)
{
    if (trace < 0) return;
    int kept = errno;
    size_t length = strlen(path);
    struct record head = {inode, offset, op, syscall(SYS_gettid), length, n};
    struct iovec parts[3] = {{&head, sizeof head}, {(void *)path, length}, {(void *)data, n}};
    if (REAL(writev)(trace, parts, 3) != (ssize_t)(sizeof head + length + n)) give_up("writing the trace", "");
    errno = kept;
}

void torture_watch(const char *where, const char *trace_path)
{
    pthread_mutex_lock(&turn);
    root_length = 0;
    if (trace >= 0) close(trace);
    trace = *trace_path ? REAL(open)(trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    snprintf(root, sizeof root, "%s", where);
    root_length = strlen(root);
    pthread_mutex_unlock(&turn);
}

void torture_note(const char *data, size_t n)
{
    pthread_mutex_lock(&turn);
    record(NOTE, 0, 0, "", data, n);
    pthread_mutex_unlock(&turn);
}

/* The rule */

void torture_rule(int action, int op, const char *pattern, long skip, long count, int error)
{
    pthread_mutex_lock(&turn);
    rule.action = action, rule.op = op, rule.skip = skip, rule.count = count, rule.error = error, rule.fired = 0;
    snprintf(rule.pattern, sizeof rule.pattern, "%s", pattern);
    pthread_mutex_unlock(&turn);
}

long torture_fired(void) { return rule.fired; }

/* Takes the turn; what is to become of this change. 0: nothing special. `leave` gives the turn back. */
static enum action enter(enum op op, const char *path)
{
    pthread_mutex_lock(&turn);
    if (!rule.action || rule.count <= 0 || rule.op != (int)op) return 0;
    if (fnmatch(rule.pattern, relative(path), 0)) return 0;
    if (rule.skip-- > 0) return 0;
    rule.count--, rule.fired++;
    if (rule.action == KILL_BEFORE) die();
    if (rule.action == FAIL) errno = rule.error;
    return rule.action;
}

static void leave(enum action action)
{
    if (action == KILL_AFTER || action == KILL_MIDDLE) die();
    pthread_mutex_unlock(&turn);
}

/* Writing */

/* Through O_DSYNC or O_SYNC a write is a step of its own, on the disk when it returns. Where one fails with EIO,
 * the new bytes stay in the page cache, as they do when a real disk refuses them. */
static ssize_t put(int fd, const char *path, const void *data, size_t n, int64_t offset, int positioned)
{
    int flags = fcntl(fd, F_GETFL);
    enum op op = flags & O_DSYNC ? WRITE_SYNC : WRITE;
    enum action action = enter(op, path);
    if (action == FAIL && (op == WRITE || rule.error != EIO)) {
        leave(action);
        return -1;
    }
    if (!positioned) offset = lseek(fd, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
    if (action == SHORT && n > 1) n /= 2;
    if (action == KILL_MIDDLE) { /* at a page of the file: within one, a kill cannot cut */
        int64_t end = (offset + n / 2) / PAGE * PAGE;
        n = end > offset ? end - offset : 0;
    }
    ssize_t done = positioned ? REAL(pwrite)(fd, data, n, offset) : REAL(write)(fd, data, n);
    if (done > 0) record(action == FAIL ? WRITE : op, inode_of_fd(fd), offset, relative(path), data, done);
    if (action == FAIL) {
        record(FAILED_SYNC, inode_of_fd(fd), 0, relative(path), NULL, 0);
        done = -1;
        errno = EIO;
    }
    leave(action);
    return done;
}

ssize_t write(int fd, const void *data, size_t n)
{
    char path[PATH_MAX];
    return watched_fd(fd, path) ? put(fd, path, data, n, 0, 0) : REAL(write)(fd, data, n);
}

#define PWRITE(name)                                                                                   \
    ssize_t name(int fd, const void *data, size_t n, off_t offset)                                     \
    {                                                                                                  \
        char path[PATH_MAX];                                                                           \
        return watched_fd(fd, path) ? put(fd, path, data, n, offset, 1) : REAL(name)(fd, data, n, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

static ssize_t put_all(int fd, const char *path, const struct iovec *parts, int count, int64_t offset, int positioned)
{
    size_t n = 0;
    for (int i = 0; i < count; i++) n += parts[i].iov_len;
    char *data = malloc(n + 1), *end = data;
    for (int i = 0; i < count; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t done = put(fd, path, data, n, offset, positioned);
    int kept = errno;
    free(data);
    errno = kept;
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    char path[PATH_MAX];
    return watched_fd(fd, path) ? put_all(fd, path, parts, count, 0, 0) : REAL(writev)(fd, parts, count);
}

#define PWRITEV(name)                                                                    \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset)             \
    {                                                                                    \
        char path[PATH_MAX];                                                             \
        return watched_fd(fd, path) ? put_all(fd, path, parts, count, offset, 1)         \
                                    : REAL(name)(fd, parts, count, offset);              \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define PWRITEV2(name)                                                                   \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int flags)  \
    {                                                                                    \
        char path[PATH_MAX];                                                             \
        if (!watched_fd(fd, path)) return REAL(name)(fd, parts, count, offset, flags);   \
        if (flags || offset < 0) give_up("pwritev2 with flags", path);                   \
        return put_all(fd, path, parts, count, offset, 1);                               \
    }
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

static int resize(int fd, const char *path, int64_t size, int (*real)(int, off_t))
{
    enum action action = enter(TRUNCATE, path);
    int done = action == FAIL ? -1 : real(fd, size);
    if (!done) record(TRUNCATE, inode_of_fd(fd), size, relative(path), NULL, 0);
    leave(action);
    return done;
}

#define FTRUNCATE(name)                                                                              \
    int name(int fd, off_t size)                                                                     \
    {                                                                                                \
        char path[PATH_MAX];                                                                         \
        return watched_fd(fd, path) ? resize(fd, path, size, REAL(name)) : REAL(name)(fd, size);     \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

#define UNFOLLOWED(name, parameters, values)                               \
    int name parameters                                                    \
    {                                                                      \
        char path[PATH_MAX];                                               \
        if (watched_fd(fd, path)) give_up(#name, path);                    \
        return REAL(name) values;                                          \
    }
UNFOLLOWED(fallocate, (int fd, int mode, off_t offset, off_t n), (fd, mode, offset, n))
UNFOLLOWED(fallocate64, (int fd, int mode, off_t offset, off_t n), (fd, mode, offset, n))
UNFOLLOWED(posix_fallocate, (int fd, off_t offset, off_t n), (fd, offset, n))
UNFOLLOWED(posix_fallocate64, (int fd, off_t offset, off_t n), (fd, offset, n))

#define TRUNCATE_PATH(name)                                                                  \
    int name(const char *file, off_t size)                                                   \
    {                                                                                        \
        char path[PATH_MAX];                                                                 \
        if (watched_path(AT_FDCWD, file, path)) give_up(#name, path);                        \
        return REAL(name)(file, size);                                                       \
    }
TRUNCATE_PATH(truncate)
TRUNCATE_PATH(truncate64)

/* LMDB maps its lock file writable and shared; what is in it need not survive anything. */
#define MMAP(name)                                                                                         \
    void *name(void *at, size_t n, int protection, int flags, int fd, off_t offset)                        \
    {                                                                                                      \
        char path[PATH_MAX];                                                                               \
        if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED) && watched_fd(fd, path)           \
            && fnmatch("*/lock.mdb", path, 0))                                                             \
            give_up("a shared writable mapping", path);                                                    \
        return REAL(name)(at, n, protection, flags, fd, offset);                                           \
    }
MMAP(mmap)
MMAP(mmap64)

#define COPY(name, type, parameters, values)                               \
    type name parameters                                                   \
    {                                                                      \
        char path[PATH_MAX];                                               \
        if (!watched_fd(out, path)) return REAL(name) values;              \
        errno = ENOSYS;                                                    \
        return -1;                                                         \
    }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off_t *, size_t);
COPY(sendfile, ssize_t, (int out, int in, off_t *at, size_t n), (out, in, at, n))
COPY(sendfile64, ssize_t, (int out, int in, off_t *at, size_t n), (out, in, at, n))
COPY(copy_file_range, ssize_t, (int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f), (in, a, out, b, n, f))
COPY(splice, ssize_t, (int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f), (in, a, out, b, n, f))

/* Syncing */

static int sync_fd(int fd, const char *path, int (*real)(int))
{
    enum action action = enter(SYNC, path);
    int done = action == FAIL ? -1 : real(fd);
    record(done ? FAILED_SYNC : SYNC, inode_of_fd(fd), 0, relative(path), NULL, 0);
    leave(action);
    return done;
}

#define SYNC_FD(name)                                                               \
    int name(int fd)                                                                \
    {                                                                               \
        char path[PATH_MAX];                                                        \
        return watched_fd(fd, path) ? sync_fd(fd, path, REAL(name)) : REAL(name)(fd); \
    }
SYNC_FD(fsync)
SYNC_FD(fdatasync)

/* Names */

static int unnamed(int flags) { return (flags & O_TMPFILE) == O_TMPFILE; }

static int create(int directory, const char *name, const char *path, int flags, mode_t mode)
{
    if (unnamed(flags)) give_up("O_TMPFILE", path);
    uint64_t before = inode_of_path(path);
    enum action action = 0;
    if (before) pthread_mutex_lock(&turn);
    else action = enter(CREATE, path);
    int fd = action == FAIL ? -1 : REAL(openat)(directory, name, flags, mode);
    if (fd >= 0 && !before) record(CREATE, inode_of_fd(fd), 0, relative(path), NULL, 0);
    else if (fd >= 0 && (flags & O_TRUNC)) record(TRUNCATE, before, 0, relative(path), NULL, 0);
    leave(action);
    return fd;
}

static int open_at(int directory, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    if (((flags & (O_CREAT | O_TRUNC)) || unnamed(flags)) && watched_path(directory, name, path))
        return create(directory, name, path, flags, mode);
    return REAL(openat)(directory, name, flags, mode);
}

#define MODE(last)                                        \
    mode_t mode = 0;                                      \
    if ((flags & O_CREAT) || unnamed(flags)) {                 \
        va_list rest;                                     \
        va_start(rest, last);                             \
        mode = va_arg(rest, mode_t);                      \
        va_end(rest);                                     \
    }
int open(const char *name, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int d, const char *name, int flags, ...);
int __open_2(const char *name, int flags) { return open_at(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return open_at(AT_FDCWD, name, flags, 0); }
int creat(const char *name, mode_t mode) { return open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return creat(name, mode); }
int openat64(int d, const char *name, int flags, ...) { MODE(flags) return open_at(d, name, flags | O_LARGEFILE, mode); }
int openat(int d, const char *name, int flags, ...) { MODE(flags) return open_at(d, name, flags, mode); }

/* A name for a file from outside: here it is a new file, none of which has been synced here. */
static void record_arrival(const char *path)
{
    static char data[1 << 16];
    int fd = REAL(open)(path, O_RDONLY | O_CLOEXEC);
    uint64_t inode = inode_of_fd(fd);
    record(CREATE, inode, 0, relative(path), NULL, 0);
    ssize_t n;
    for (int64_t at = 0; (n = pread(fd, data, sizeof data, at)) > 0; at += n)
        record(WRITE, inode, at, relative(path), data, n);
    close(fd);
}

static int move(enum op op, int from, const char *a, int to, const char *b, unsigned flags)
{
    char source[PATH_MAX], target[PATH_MAX];
    int leaves = watched_path(from, a, source), arrives = watched_path(to, b, target);
    if (leaves != arrives && (op != LINK || leaves))
        give_up("a rename or link across the watched directory", arrives ? target : source);
    enum action action = arrives ? enter(op, target) : 0;
    int done = action == FAIL ? -1
             : op == LINK ? REAL(linkat)(from, a, to, b, flags) : REAL(renameat2)(from, a, to, b, flags);
    if (arrives) {
        if (!done && leaves) record(op, 0, 0, relative(source), relative(target), strlen(relative(target)));
        if (!done && !leaves) record_arrival(target);
        leave(action);
    }
    return done;
}

int rename(const char *a, const char *b) { return move(RENAME, AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int from, const char *a, int to, const char *b) { return move(RENAME, from, a, to, b, 0); }
int renameat2(int from, const char *a, int to, const char *b, unsigned f) { return move(RENAME, from, a, to, b, f); }
int link(const char *a, const char *b) { return move(LINK, AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int from, const char *a, int to, const char *b, int f) { return move(LINK, from, a, to, b, f); }

static int drop(int directory, const char *name, int flags)
{
    char path[PATH_MAX];
    if (!watched_path(directory, name, path)) return REAL(unlinkat)(directory, name, flags);
    enum op op = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    enum action action = enter(op, path);
    int done = action == FAIL ? -1 : REAL(unlinkat)(directory, name, flags);
    if (!done) record(op, 0, 0, relative(path), NULL, 0);
    leave(action);
    return done;
}

int unlink(const char *name) { return drop(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return drop(AT_FDCWD, name, AT_REMOVEDIR); }
int unlinkat(int directory, const char *name, int flags) { return drop(directory, name, flags); }

int mkdirat(int directory, const char *name, mode_t mode)
{
    char path[PATH_MAX];
    if (!watched_path(directory, name, path)) return REAL(mkdirat)(directory, name, mode);
    enum action action = enter(MKDIR, path);
    int done = action == FAIL ? -1 : REAL(mkdirat)(directory, name, mode);
    if (!done) record(MKDIR, inode_of_path(path), 0, relative(path), NULL, 0);
    leave(action);
    return done;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
