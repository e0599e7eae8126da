// The Python module: which paths were compiled and can run here, and one call that runs an operation on a path.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "table.hpp"

extern const Path moe_path_generic;
#ifdef MOE_HAS_AVX2
extern const Path moe_path_avx2;
#endif
#ifdef MOE_HAS_AVX512
extern const Path moe_path_avx512;
#endif
#ifdef MOE_HAS_AVX512_BF16
extern const Path moe_path_avx512_bf16;
#endif
#ifdef MOE_HAS_AMX
extern const Path moe_path_amx;
#endif

namespace {

#if defined(__x86_64__)
// Bits of CPUID's leaf 7: the names that compilers have for them came later than the instructions.
bool has_avx512_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 5);
}

// The processor has it, and the kernel lets this process use the tiles' 8 KiB of state.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILES)) != (BF16 | TILES)) return false;
#ifdef __linux__
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Path* path_at(int index) {
    int found = 0;
#ifdef MOE_HAS_AMX
    static const bool amx = has_avx512() && has_avx512_bf16() && has_amx();
    if (amx && found++ == index) return &moe_path_amx;
#endif
#ifdef MOE_HAS_AVX512_BF16
    if (has_avx512() && has_avx512_bf16() && found++ == index) return &moe_path_avx512_bf16;
#endif
#ifdef MOE_HAS_AVX512
    if (has_avx512() && found++ == index) return &moe_path_avx512;
#endif
#ifdef MOE_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && found++ == index) return &moe_path_avx2;
#endif
    return found == index ? &moe_path_generic : nullptr;
}

PyObject* paths(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (int i = 0; names && path_at(i); i++) {
        PyObject* name = PyUnicode_FromString(path_at(i)->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

constexpr Py_ssize_t MAX_WORDS = 24;

// run(path, operation, *words): ints, and floats as doubles.
PyObject* run(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count < 2 || count - 2 > MAX_WORDS) return PyErr_Format(PyExc_TypeError, "run() got %zd arguments", count);
    int64_t words[MAX_WORDS] = {};
    int64_t which[2];
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t* to = i < 2 ? which + i : words + i - 2;
        if (i >= 2 && PyFloat_Check(given[i])) {
            double value = PyFloat_AsDouble(given[i]);
            std::memcpy(to, &value, sizeof value);
        } else {
            *to = PyLong_AsLongLong(given[i]);
        }
        if (PyErr_Occurred()) return nullptr;
    }
    const Path* path = which[0] < 0 || which[0] > 8 ? nullptr : path_at(int(which[0]));
    if (!path || which[1] < 0 || which[1] >= NUM_OPERATIONS)
        return PyErr_Format(PyExc_ValueError, "no such path or operation");
    Operation operation = path->operations[which[1]];
    PyThreadState* state = PyEval_SaveThread();
    operation(words);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

// replay(path, address, count): `count` operations, each a line of 1 + MAX_WORDS words, the first of which says which.
PyObject* replay(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "replay() got %zd arguments", count);
    int64_t numbers[3];
    for (int i = 0; i < 3; i++) numbers[i] = PyLong_AsLongLong(given[i]);
    if (PyErr_Occurred()) return nullptr;
    const Path* path = numbers[0] < 0 || numbers[0] > 8 ? nullptr : path_at(int(numbers[0]));
    if (!path) return PyErr_Format(PyExc_ValueError, "no such path");
    const int64_t* line = reinterpret_cast<const int64_t*>(numbers[1]);
    PyThreadState* state = PyEval_SaveThread();
    for (int64_t i = 0; i < numbers[2]; i++, line += 1 + MAX_WORDS) path->operations[line[0]](line + 1);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"paths", paths, METH_NOARGS, "Names of the paths that this processor can run, best first."},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
     "run(path, operation, *words)"},
    {"replay", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(replay)), METH_FASTCALL,
     "replay(path, address, count)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
