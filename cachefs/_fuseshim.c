/* What pyfuse3 cannot do by itself: three libfuse functions that behave a little differently.
 *
 * An extension module without functions. cachefs/fuse.py imports it with RTLD_GLOBAL before pyfuse3, so that the
 * symbols below are found before libfuse's. It is linked with libfuse3: RTLD_NEXT is then libfuse's own function.
 * No libfuse internals are used, only its public functions.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <errno.h>
#include <fuse3/fuse_lowlevel.h>
#include <stdint.h>

#define FOPEN_NOFLUSH (1u << 5)     /* include/uapi/linux/fuse.h */
#define FOPEN_PASSTHROUGH (1u << 7) /* never together with FOPEN_KEEP_CACHE: EIO */
#define FH_PASSTHROUGH 63           /* bit of fh that says: bits 32 to 62 are a backing id */
#define FH_BACKING_SHIFT 32
#define FH_BACKING_MASK 0x7fffffffu
#define UNLOCKED_BYTES_MIN (64 * 1024)

/* The device is O_NONBLOCK: a request can be withdrawn between epoll and read, and pyfuse3 reads with the GIL held, so
 * that a blocking read would stop the whole process until some other request comes. pyfuse3 goes on after EINTR only.
 * A session that was told to end takes no further request: libfuse would drop it, and its caller would hang. */
int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    static int (*next)(struct fuse_session *, struct fuse_buf *);
    if (!next)
        next = (int (*)(struct fuse_session *, struct fuse_buf *))dlsym(RTLD_NEXT, "fuse_session_receive_buf");
    if (!next)
        return -ENOSYS;
    if (fuse_session_exited(session))
        return 0;
    int result = next(session, buf);
    return result == -EAGAIN ? -EINTR : result;
}

/* A READ's answer is copied into the reader's pages: 0.1 to 0.2 ms for 1 MiB, and pyfuse3 answers with the GIL held. The
 * bytes are a buffer that nobody changes before pyfuse3 goes on. */
int fuse_reply_buf(fuse_req_t request, const char *bytes, size_t size)
{
    static int (*next)(fuse_req_t, const char *, size_t);
    if (!next)
        next = (int (*)(fuse_req_t, const char *, size_t))dlsym(RTLD_NEXT, "fuse_reply_buf");
    if (!next)
        return -ENOSYS;
    if (size < UNLOCKED_BYTES_MIN || !PyGILState_Check())
        return next(request, bytes, size);
    PyThreadState *state = PyEval_SaveThread();
    int result = next(request, bytes, size);
    PyEval_RestoreThread(state);
    return result;
}

/* struct fuse_open_out of the uapi header, which libfuse 3.14 cannot fill: its last field was padding before 7.40. */
int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *info)
{
    static int (*next)(fuse_req_t, const struct fuse_file_info *);
    if (!next)
        next = (int (*)(fuse_req_t, const struct fuse_file_info *))dlsym(RTLD_NEXT, "fuse_reply_open");
    if (!next)
        return -ENOSYS;
    if (!((info->fh >> FH_PASSTHROUGH) & 1))
        return next(request, info);
    struct {
        uint64_t fh;
        uint32_t open_flags;
        int32_t backing_id;
    } out = {info->fh, FOPEN_PASSTHROUGH | FOPEN_NOFLUSH, (int32_t)((info->fh >> FH_BACKING_SHIFT) & FH_BACKING_MASK)};
    return fuse_reply_buf(request, (const char *)&out, sizeof out);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "cachefs._fuseshim", "Loaded for its symbols; see the source.", 0, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fuseshim(void)
{
    return PyModule_Create(&module);
}
