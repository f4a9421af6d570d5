/* Counts the calls that change files below CRASH_ROOT, and ends the process in the place of one of them.
 *
 * Preloaded, so that it sees what Python, torch's C++, safetensors' Rust, bash and coreutils do alike. It sleeps until
 * crash_arm is called, or from the start where the environment has CRASH_ROOT, CRASH_COUNTER and CRASH_AT.
 *
 * The count is in a file that all processes share. By itself it ends all processes of the group in the place of call
 * number CRASH_AT, a write in its middle.
 *
 * Armed by crash_arm, the process stops (SIGSTOP) before each call and in the middle of each write, so that another can
 * look at what is there, and lets it go on. Beside the counter, in a file named .unsynced, is then what a power cut would
 * lose: a line (inode, bytes that are safe) for each file with bytes that no fsync has followed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 1024

struct file {
  dev_t dev;
  ino_t ino;
  off_t synced; /* bytes that are safe */
};

static char root[PATH_MAX];
static size_t root_length;
static volatile long *counter;
static long at;
static int stopping, log_fd = -1;
static char unsynced[PATH_MAX];
static struct file *dirty;
static int dirty_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void arm(const char *below, const char *counter_file, long when, const char *log_file) {
  int fd = syscall(SYS_openat, AT_FDCWD, counter_file, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0 || syscall(SYS_ftruncate, fd, (off_t)sizeof(long)) != 0) abort();
  counter = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (counter == MAP_FAILED) abort();
  if (log_file && *log_file) {
    fd = syscall(SYS_openat, AT_FDCWD, log_file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900); /* out of the way of a shell's own numbers */
    syscall(SYS_close, fd);
  }
  if (!dirty) dirty = calloc(FILES, sizeof *dirty);
  dirty_count = 0;
  at = when;
  snprintf(root, sizeof root, "%s", below);
  root_length = strlen(root);
}

__attribute__((constructor)) static void arm_from_environment(void) {
  const char *below = getenv("CRASH_ROOT"), *file = getenv("CRASH_COUNTER"), *when = getenv("CRASH_AT");
  if (below && file && when) arm(below, file, atol(when), getenv("CRASH_LOG"));
}

void crash_arm(const char *below, const char *counter_file, const char *log_file) {
  snprintf(unsynced, sizeof unsynced, "%s.unsynced", counter_file);
  arm(below, counter_file, -1, log_file);
  stopping = 1;
}

static int ends_with(const char *path, const char *end) {
  size_t length = strlen(path), of_end = strlen(end);
  return length >= of_end && strcmp(path + length - of_end, end) == 0;
}

/* Logs are for reading: any prefix of one is right, and there are many writes to them. */
static int watched(const char *path) {
  return root_length && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]) &&
         !ends_with(path, ".log");
}

static void absolute(int folder, const char *path, char *found) {
  char base[PATH_MAX] = "", link[64];
  if (path[0] == '/') {
    snprintf(found, PATH_MAX, "%s", path);
  } else {
    if (folder == AT_FDCWD) {
      if (syscall(SYS_getcwd, base, sizeof base) < 0) base[0] = 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
      base[length < 0 ? 0 : length] = 0;
    }
    if (snprintf(found, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) found[0] = 0;
  }
}

/* The path of an open regular file below the root; 0 if it is none. */
static int open_file(int fd, char *path, struct stat *status) {
  char link[64];
  if (!root_length || fd < 0 || fd == log_fd) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return watched(path) && fstat(fd, status) == 0 && S_ISREG(status->st_mode);
}

static void end(void) {
  kill(0, SIGKILL);
  for (;;) pause();
}

static void stop(void) {
  pthread_mutex_lock(&lock);
  int fd = syscall(SYS_openat, AT_FDCWD, unsynced, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  for (int index = 0; index < dirty_count; index++) {
    char line[64];
    int length = snprintf(line, sizeof line, "%lu %ld\n", (unsigned long)dirty[index].ino, (long)dirty[index].synced);
    syscall(SYS_write, fd, line, length);
  }
  syscall(SYS_close, fd);
  pthread_mutex_unlock(&lock);
  kill(getpid(), SIGSTOP);
}

/* Whether this call is the one that does not happen. */
static int due(const char *call, const char *path) {
  long number = __sync_add_and_fetch(counter, 1);
  if (log_fd >= 0) {
    char line[PATH_MAX + 64];
    const char *place = strlen(path) > root_length ? path + root_length + 1 : path;
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call, place);
    syscall(SYS_write, log_fd, line, length);
  }
  if (stopping) stop();
  return number == at;
}

static void mark(const struct stat *status, const char *path) {
  if (!stopping || strstr(path, ".sqlite")) return; /* SQLite writes in the middle of files, and is proved elsewhere */
  pthread_mutex_lock(&lock);
  int index = 0;
  while (index < dirty_count && !(dirty[index].ino == status->st_ino && dirty[index].dev == status->st_dev)) index++;
  if (index == dirty_count) {
    if (index == FILES) abort();
    dirty_count++;
    dirty[index].dev = status->st_dev;
    dirty[index].ino = status->st_ino;
    dirty[index].synced = status->st_size;
  }
  pthread_mutex_unlock(&lock);
}

/* Its bytes are safe, or the file is gone. */
static void settled(const struct stat *status) {
  pthread_mutex_lock(&lock);
  for (int index = 0; index < dirty_count; index++)
    if (dirty[index].ino == status->st_ino && dirty[index].dev == status->st_dev) {
      dirty[index] = dirty[--dirty_count];
      break;
    }
  pthread_mutex_unlock(&lock);
}

/* ---- names ---- */

static void on_names(const char *call, int from_folder, const char *from, int to_folder, const char *to) {
  char old[PATH_MAX], new[PATH_MAX];
  if (!root_length) return;
  absolute(from_folder, from, old);
  if (to) absolute(to_folder, to, new);
  if ((watched(old) || (to && watched(new))) && due(call, old)) end();
}

/* The file that a call takes a name from: what another process may do with its number is no concern of ours. */
static int named(int folder, const char *path, struct stat *status) {
  return stopping && fstatat(folder, path, status, AT_SYMLINK_NOFOLLOW) == 0 && status->st_nlink == 1;
}

#define MOVING(a, from, b, to, real)          \
  struct stat replaced;                       \
  on_names("rename", a, from, b, to);         \
  int gone = named(b, to, &replaced);         \
  int result = real;                          \
  if (gone && result == 0) settled(&replaced); \
  return result;

#define REMOVING(folder, path, real)         \
  struct stat removed;                       \
  on_names("unlink", folder, path, 0, NULL); \
  int gone = named(folder, path, &removed);  \
  int result = real;                         \
  if (gone && result == 0) settled(&removed); \
  return result;

int rename(const char *from, const char *to) { MOVING(AT_FDCWD, from, AT_FDCWD, to, REAL(rename)(from, to)) }
int renameat(int a, const char *from, int b, const char *to) { MOVING(a, from, b, to, REAL(renameat)(a, from, b, to)) }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  MOVING(a, from, b, to, syscall(SYS_renameat2, a, from, b, to, flags))
}
int unlink(const char *path) { REMOVING(AT_FDCWD, path, REAL(unlink)(path)) }
int unlinkat(int folder, const char *path, int flags) {
  REMOVING(folder, path, REAL(unlinkat)(folder, path, flags))
}
int remove(const char *path) { REMOVING(AT_FDCWD, path, REAL(remove)(path)) }
int link(const char *from, const char *to) {
  on_names("link", AT_FDCWD, from, AT_FDCWD, to);
  return REAL(link)(from, to);
}
int symlink(const char *from, const char *to) {
  on_names("symlink", AT_FDCWD, to, 0, NULL);
  return REAL(symlink)(from, to);
}
int rmdir(const char *path) {
  on_names("rmdir", AT_FDCWD, path, 0, NULL);
  return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t rights) {
  on_names("mkdir", AT_FDCWD, path, 0, NULL);
  return REAL(mkdir)(path, rights);
}
int mkdirat(int folder, const char *path, mode_t rights) {
  on_names("mkdir", folder, path, 0, NULL);
  return REAL(mkdirat)(folder, path, rights);
}

/* ---- opening, where it makes or empties a file ---- */

static void on_open(int folder, const char *path, int flags) {
  struct stat status;
  if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_DIRECTORY)) return;
  if (!root_length) return;
  if ((flags & O_CREAT) && !(flags & O_TRUNC) && fstatat(folder, path, &status, 0) == 0) return;
  on_names("open", folder, path, 0, NULL);
}


#define RIGHTS                              \
  mode_t rights = 0;                        \
  if (flags & (O_CREAT | O_TMPFILE)) {      \
    va_list rest;                           \
    va_start(rest, flags);                  \
    rights = va_arg(rest, mode_t);          \
    va_end(rest);                           \
  }

int open(const char *path, int flags, ...) {
  RIGHTS
  on_open(AT_FDCWD, path, flags);
  return REAL(open)(path, flags, rights);
}
int open64(const char *path, int flags, ...) {
  RIGHTS
  on_open(AT_FDCWD, path, flags);
  return REAL(open64)(path, flags, rights);
}
int openat(int folder, const char *path, int flags, ...) {
  RIGHTS
  on_open(folder, path, flags);
  return REAL(openat)(folder, path, flags, rights);
}
int openat64(int folder, const char *path, int flags, ...) {
  RIGHTS
  on_open(folder, path, flags);
  return REAL(openat64)(folder, path, flags, rights);
}
int creat(const char *path, mode_t rights) {
  on_open(AT_FDCWD, path, O_CREAT | O_TRUNC);
  return REAL(creat)(path, rights);
}
FILE *fopen(const char *path, const char *how) {
  if (how[0] == 'w') on_open(AT_FDCWD, path, O_CREAT | O_TRUNC);
  return REAL(fopen)(path, how);
}
FILE *fopen64(const char *path, const char *how) {
  if (how[0] == 'w') on_open(AT_FDCWD, path, O_CREAT | O_TRUNC);
  return REAL(fopen64)(path, how);
}

/* ---- content ---- */

static __thread ino_t resumed; /* the file whose second half comes next */

/* Whether the write of `fd` is to be torn: the one that is due, or, where it stops, each. */
static int on_write(int fd) {
  char path[PATH_MAX];
  struct stat status;
  int kept = errno, torn = 0;
  if (open_file(fd, path, &status)) {
    torn = due("write", path);
    mark(&status, path);
    if (stopping) {
      torn = status.st_ino != resumed;
      resumed = torn ? status.st_ino : 0;
    }
  }
  errno = kept;
  return torn;
}

/* A call that writes its first half by `half`, and then ends or stops there. */
#define TORN(fd, half)             \
  if (on_write(fd)) {              \
    if (!stopping) {               \
      half;                        \
      end();                       \
    }                              \
    ssize_t some = half;           \
    stop();                        \
    return some; /* the caller writes the rest */ \
  }

ssize_t write(int fd, const void *data, size_t count) {
  TORN(fd, syscall(SYS_write, fd, data, (count + 1) / 2))
  return REAL(write)(fd, data, count);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t place) {
  TORN(fd, syscall(SYS_pwrite64, fd, data, (count + 1) / 2, place))
  return REAL(pwrite)(fd, data, count, place);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t place) {
  TORN(fd, syscall(SYS_pwrite64, fd, data, (count + 1) / 2, place))
  return REAL(pwrite64)(fd, data, count, place);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  TORN(fd, syscall(SYS_writev, fd, parts, (count + 1) / 2))
  return REAL(writev)(fd, parts, count);
}
ssize_t sendfile(int to, int from, off_t *place, size_t count) {
  TORN(to, syscall(SYS_sendfile, to, from, place, count < 64 ? 1 : 64))
  return REAL(sendfile)(to, from, place, count);
}
ssize_t sendfile64(int to, int from, off64_t *place, size_t count) {
  TORN(to, syscall(SYS_sendfile, to, from, place, count < 64 ? 1 : 64))
  return REAL(sendfile64)(to, from, place, count);
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t count, unsigned flags) {
  TORN(to, syscall(SYS_copy_file_range, from, a, to, b, count < 64 ? 1 : 64, flags))
  return REAL(copy_file_range)(from, a, to, b, count, flags);
}
static void on_truncate(int fd) {
  char path[PATH_MAX];
  struct stat status;
  int kept = errno;
  if (open_file(fd, path, &status) && due("truncate", path)) end();
  errno = kept;
}
int ftruncate(int fd, off_t size) {
  on_truncate(fd);
  return REAL(ftruncate)(fd, size);
}
int ftruncate64(int fd, off64_t size) {
  on_truncate(fd);
  return REAL(ftruncate64)(fd, size);
}
int truncate(const char *path, off_t size) {
  on_names("truncate", AT_FDCWD, path, 0, NULL);
  return REAL(truncate)(path, size);
}

static int on_sync(int fd, struct stat *status) {
  char path[PATH_MAX];
  int kept = errno, mine = open_file(fd, path, status);
  if (mine && due("fsync", path)) end();
  errno = kept;
  return mine;
}
int fsync(int fd) {
  struct stat status;
  int mine = on_sync(fd, &status), result = REAL(fsync)(fd);
  if (mine && stopping && result == 0) settled(&status);
  return result;
}
int fdatasync(int fd) {
  struct stat status;
  int mine = on_sync(fd, &status), result = REAL(fdatasync)(fd);
  if (mine && stopping && result == 0) settled(&status);
  return result;
}
