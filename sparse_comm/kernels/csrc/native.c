/* sparse_comm.kernels._native: pack, expand and find non-zeros on raw CPU addresses.

   No header of torch, and Python's stable interface only: one binary serves every torch and every
   Python from 3.10 on. sparse_comm/kernels/native.py checks the tensors and passes addresses. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "levels.h"

#include "jobs.h"

static int HERE;           /* how many of LEVELS this processor runs */
static const level *LEVEL_; /* the one in use */

/* One argument a name, each an integer. */
static int read_integers(PyObject *const *given, Py_ssize_t count, long long *read,
                         Py_ssize_t expected) {
    if (count != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        read[i] = PyLong_AsLongLong(given[i]);
        if (read[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

enum { OUT, OUT_DTYPE, IN, IN_DTYPE, BITMAP, OFFSETS, NUMEL, NNZ, THREADS, COMMON };

static int prepare(job *j, const long long *a, long long dense_dtype, long long value_dtype) {
    if (dense_dtype < 0 || dense_dtype >= DTYPES || value_dtype < 0 || value_dtype >= DTYPES) {
        PyErr_SetString(PyExc_ValueError, "unknown dtype code");
        return -1;
    }
    if (a[NUMEL] < 0 || a[NNZ] < 0 || a[NNZ] > a[NUMEL]) {
        PyErr_Format(PyExc_ValueError, "%lld unpruned of %lld entries", a[NNZ], a[NUMEL]);
        return -1;
    }
    j->level = LEVEL_;
    j->out = (char *)(uintptr_t)a[OUT];
    j->in = (const char *)(uintptr_t)a[IN];
    j->bits = (const unsigned char *)(uintptr_t)a[BITMAP];
    j->offsets = (const int64_t *)(uintptr_t)a[OFFSETS];
    j->numel = a[NUMEL];
    j->nnz = a[NNZ];
    j->blocks = (a[NUMEL] + BLOCK - 1) / BLOCK;
    j->dense_size = ITEMSIZE[dense_dtype];
    j->value_size = ITEMSIZE[value_dtype];
    j->copies = dense_dtype == value_dtype;
    j->width = j->dense_size == 2 ? 0 : j->dense_size == 4 ? 1 : 2;
    return 0;
}

static PyObject *finish(job *j, void (*group)(job *, int64_t, int64_t), long long threads) {
    int64_t bad;
    Py_BEGIN_ALLOW_THREADS
    bad = run(j, group, (int)(threads < MAX_THREADS ? threads : MAX_THREADS));
    Py_END_ALLOW_THREADS
    if (bad >= 0)
        return PyErr_Format(PyExc_ValueError,
                            "bitmap and offsets disagree in block %lld, or hold another number "
                            "of unpruned entries than %lld",
                            (long long)bad, (long long)j->nnz);
    Py_RETURN_NONE;
}

static PyObject *pack(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    enum { ADD = COMMON };
    long long a[COMMON + 1];
    job j;
    if (read_integers(given, count, a, COMMON + 1) ||
        prepare(&j, a, a[IN_DTYPE], a[OUT_DTYPE]))
        return NULL;
    j.stream = 0;
    j.convert = (a[ADD] ? j.level->accumulate : j.level->convert)[a[IN_DTYPE]][a[OUT_DTYPE]];
    return finish(&j, pack_group, a[THREADS]);
}

static PyObject *expand(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    long long a[COMMON];
    job j;
    if (read_integers(given, count, a, COMMON) ||
        prepare(&j, a, a[OUT_DTYPE], a[IN_DTYPE]))
        return NULL;
    j.stream = (uint64_t)j.numel * j.dense_size >= STREAM_BYTES && (uintptr_t)j.out % 64 == 0;
    j.convert = j.level->convert[a[IN_DTYPE]][a[OUT_DTYPE]];
    return finish(&j, expand_group, a[THREADS]);
}

static PyObject *nonzeros(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    enum { ENTRIES, ITEM, COUNT, BITS, STARTS, NONZEROS };
    long long a[NONZEROS];
    int64_t nnz;
    if (read_integers(given, count, a, NONZEROS)) return NULL;
    if ((a[ITEM] != 2 && a[ITEM] != 4 && a[ITEM] != 8) || a[COUNT] < 0)
        return PyErr_Format(PyExc_ValueError, "%lld entries of %lld bytes", a[COUNT], a[ITEM]);
    Py_BEGIN_ALLOW_THREADS
    nnz = find_nonzeros(LEVEL_, (unsigned char *)(uintptr_t)a[BITS],
                        (int64_t *)(uintptr_t)a[STARTS], (const char *)(uintptr_t)a[ENTRIES],
                        a[COUNT], (size_t)a[ITEM]);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(nnz);
}

static PyObject *instruction_sets(PyObject *module, PyObject *nothing) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < HERE; i++) {
        PyObject *name = PyUnicode_FromString(LEVELS[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *use(PyObject *module, PyObject *given) {
    long i = PyLong_AsLong(given);
    if (i == -1 && PyErr_Occurred()) return NULL;
    if (i < 0 || i >= HERE)
        return PyErr_Format(PyExc_ValueError, "instruction set %ld of %d", i, HERE);
    LEVEL_ = &LEVELS[i];
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"pack", (PyCFunction)(void (*)(void))pack, METH_FASTCALL,
     "pack(out, out dtype, dense, dense dtype, bitmap, offsets, numel, nnz, threads, add)"},
    {"expand", (PyCFunction)(void (*)(void))expand, METH_FASTCALL,
     "expand(out, out dtype, values, values dtype, bitmap, offsets, numel, nnz, threads)"},
    {"nonzeros", (PyCFunction)(void (*)(void))nonzeros, METH_FASTCALL,
     "nonzeros(entries, bytes an entry, numel, bitmap, offsets) -> their number"},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those of this processor, best last."},
    {"use", use, METH_O, "Use the instruction set of this index."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_native", "Pack, expand and find non-zeros on raw CPU addresses.", -1, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    HERE = levels_here();
    LEVEL_ = &LEVELS[HERE - 1];
    return PyModule_Create(&MODULE);
}
