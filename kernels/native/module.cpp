// The functions of ops.h as a Python module. Pointers come as tensors, of which Tensor.data_ptr is asked, or as integers;
// None is the null pointer. What a thread calls can be recorded, and done again in one call, on the same addresses; and
// measured.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ops.h"
#include "threads.h"

#include <chrono>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// The address of a tensor's first number, in memory that the caller holds on to.
void* address_of(PyObject* tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (PyErr_Occurred()) return nullptr;  // of an argument before
    PyObject* number = PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr);
    if (number == nullptr) return nullptr;
    void* address = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return address;
}

template <typename Value>
Value from_python(PyObject* object) {
    if constexpr (std::is_pointer_v<Value>)
        return object == Py_None       ? nullptr
               : PyLong_Check(object) ? (Value)PyLong_AsVoidPtr(object)
                                      : (Value)address_of(object);
    else if constexpr (std::is_floating_point_v<Value>)
        return (Value)PyFloat_AsDouble(object);
    else
        return (Value)PyLong_AsLongLong(object);
}

// What is called while a thread records, to be done again: what calls it, the number of its arguments, and these.
thread_local std::vector<int64_t>* recording = nullptr;

using Replay = void (*)(const int64_t*);

template <typename Value>
int64_t to_word(Value value) {
    static_assert(sizeof(Value) == sizeof(int64_t));
    int64_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
}

template <typename Value>
Value from_word(int64_t word) {
    Value value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <auto function, typename... Args, size_t... I>
void replay_one(const int64_t* words, void (*)(Args...), std::index_sequence<I...>) {
    function(from_word<Args>(words[I])...);
}

template <auto function, typename... Args>
void replay_call(const int64_t* words) {
    replay_one<function>(words, (void (*)(Args...))nullptr, std::index_sequence_for<Args...>());
}

template <auto function, typename Result, typename... Args>
constexpr Replay replay_of(Result (*)(Args...)) {
    return replay_call<function, Args...>;
}

// Seconds of each operation, while a thread measures them.
thread_local std::map<Replay, double>* timing = nullptr;

template <typename Run>
void timed(Replay which, Run run) {
    if (timing == nullptr) return run();
    auto begin = std::chrono::steady_clock::now();
    run();
    (*timing)[which] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

template <auto function, typename Result, typename... Args, size_t... I>
PyObject* call_with(Result (*)(Args...), PyObject* const* objects, std::index_sequence<I...>) {
    std::tuple<Args...> args{from_python<Args>(objects[I])...};
    if (PyErr_Occurred()) return nullptr;
    if (recording != nullptr) {
        int64_t words[] = {to_word(replay_of<function>(function)), (int64_t)sizeof...(Args),
                           to_word(std::get<I>(args))...};
        recording->insert(recording->end(), std::begin(words), std::end(words));
    }
    long long result = 0;
    Py_BEGIN_ALLOW_THREADS;
    timed(replay_of<function>(function), [&] {
        if constexpr (std::is_void_v<Result>)
            function(std::get<I>(args)...);
        else
            result = function(std::get<I>(args)...);
    });
    Py_END_ALLOW_THREADS;
    if constexpr (std::is_void_v<Result>) Py_RETURN_NONE;
    return PyLong_FromLongLong(result);
}

template <auto function, typename Result, typename... Args>
PyObject* call(Result (*typed)(Args...), PyObject* const* objects, Py_ssize_t count) {
    if (count != sizeof...(Args)) return PyErr_Format(PyExc_TypeError, "takes %zu arguments", sizeof...(Args));
    return call_with<function>(typed, objects, std::index_sequence_for<Args...>());
}

template <auto function>
PyObject* method(PyObject*, PyObject* const* objects, Py_ssize_t count) {
    return call<function>(function, objects, count);
}

PyObject* begin_recording(PyObject*, PyObject*) {
    if (recording != nullptr) return PyErr_Format(PyExc_RuntimeError, "this thread is recording already");
    recording = new std::vector<int64_t>;
    Py_RETURN_NONE;
}

PyObject* end_recording(PyObject*, PyObject*) {
    if (recording == nullptr) return PyErr_Format(PyExc_RuntimeError, "this thread is not recording");
    std::unique_ptr<std::vector<int64_t>> ended(recording);
    recording = nullptr;
    return PyBytes_FromStringAndSize((const char*)ended->data(), ended->size() * sizeof(int64_t));
}

PyObject* replay(PyObject*, PyObject* tape) {
    char* bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(tape, &bytes, &size) < 0) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    minirksc::with_team([&] {
        const int64_t *word = (const int64_t*)bytes, *end = word + size / sizeof(int64_t);
        for (; word < end; word += 2 + word[1]) {
            Replay call = from_word<Replay>(word[0]);
            timed(call, [&] { call(word + 2); });
        }
    });
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#define OPERATIONS(X) \
    X(add_rms_norm)   \
    X(gated_act)      \
    X(kv_store)       \
    X(confidence)     \
    X(draw)           \
    X(decode_attention) \
    X(attention_bf16) \
    X(pack_weight)    \
    X(unpack_rows)    \
    X(linear)         \
    X(has_bf16_products) \
    X(pack_weight_bf16) \
    X(unpack_rows_bf16) \
    X(linear_bf16) \
    X(linear_int8)

#define NAME(name) {#name, replay_of<minirksc::name>(minirksc::name)},
const struct {
    const char* name;
    Replay replay;
} NAMES[] = {OPERATIONS(NAME)};

PyObject* begin_timing(PyObject*, PyObject*) {
    if (timing != nullptr) return PyErr_Format(PyExc_RuntimeError, "this thread is measuring already");
    timing = new std::map<Replay, double>;
    Py_RETURN_NONE;
}

// {name: seconds} of what was called and replayed.
PyObject* end_timing(PyObject*, PyObject*) {
    if (timing == nullptr) return PyErr_Format(PyExc_RuntimeError, "this thread is not measuring");
    std::unique_ptr<std::map<Replay, double>> ended(timing);
    timing = nullptr;
    PyObject* seconds = PyDict_New();
    for (const auto& one : NAMES) {
        auto found = ended->find(one.replay);
        if (seconds == nullptr || found == ended->end()) continue;
        PyObject* value = PyFloat_FromDouble(found->second);
        if (value == nullptr || PyDict_SetItemString(seconds, one.name, value) < 0) Py_CLEAR(seconds);
        Py_XDECREF(value);
    }
    return seconds;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)())method<minirksc::name>, METH_FASTCALL, nullptr},
PyMethodDef METHODS[] = {
    OPERATIONS(METHOD)
    {"begin_recording", begin_recording, METH_NOARGS, nullptr},
    {"end_recording", end_recording, METH_NOARGS, nullptr},
    {"replay", replay, METH_O, nullptr},
    {"begin_timing", begin_timing, METH_NOARGS, nullptr},
    {"end_timing", end_timing, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

int64_t minirksc::has_bf16_products() {
    static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    return has;
}

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&MODULE); }
