"""Malformed input of every kind, by table and by seeded mutation: exactly one line on stderr and exit code 2.

Each table holds what must be refused. A mutation may stay valid; then it must be accepted as quietly.
"""

import functools
import gc
import gzip
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import warnings
import zipfile
from io import BytesIO

import pytest
import torch
from helpers import ROOT, flags
from safetensors.torch import load_file, save, save_file

import family
import lora
import sft
import spin
from model import GPTNeo

GOOD = b'{"prompt": "abc", "response": "EY1 B IY0"}\n'
DATA = b"".join(GOOD.replace(b"abc", bytes([a, b])) for a in b"abcde" for b in b"abcde") + GOOD.replace(
    b"abc", b"a" * 30 + b"!"
)
HEAD = "transformer.wte.weight"
EOS = "<|endoftext|>"


def deep(depth, leaf=0):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


NONSENSE = (
    None, True, False, -1, 0, 1, 3, 10**9, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308,
    float("nan"),
    float("inf"), "", "x", "\0", "\ud800", "\x1b[2J", "../x", "x" * 10_000, [], {}, [[]], [None], {"": None}, {"x": {}},
    deep(100), deep(700),
)  # fmt: skip


class Accepted(Exception):
    """The input passed every check: the run would begin now."""


class Hang(BaseException):
    """No Exception, which the code under test may catch."""


@pytest.fixture
def end(monkeypatch, capfd, tmp_path):
    """Runs a command line up to its first response. Returns its one line on stderr, or "" where it was accepted.

    Fails where it takes ten seconds or 2 GiB, warns, prints more, or writes anything.
    """

    def accepted(*_):
        raise Accepted

    def offline(*_, **__):
        raise OSError("offline")

    def hang(*_):
        raise Hang

    def run(argv, case=None, script=spin):
        out = tmp_path / "out"
        signal.setitimer(signal.ITIMER_REAL, 10)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                code = script.main([str(a) for a in argv])
        except Accepted:
            code = 0
            shutil.rmtree(out)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        error = capfd.readouterr().err
        assert not warned, (case, str(warned[0].message))
        assert code in (0, 2) and not out.exists(), case
        if code == 0:
            assert error == "", (case, error)
        else:
            assert error.startswith(f"{script.__name__}.py: error: ") and error.index("\n") == len(error) - 1, (
                case,
                error,
            )
        return error

    for script, method in ((spin, "play"), (family, "play"), (sft, "fine_tune")):
        monkeypatch.setattr(script, method, accepted)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    before, limit = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, limit[1]))
    gc.freeze()  # what torch has imported; else every few runs would wait for it to be searched
    yield run
    gc.unfreeze()
    resource.setrlimit(resource.RLIMIT_AS, limit)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(start, tmp_path):
    """A copy of the start to break."""
    return shutil.copytree(start, tmp_path / "model")


@pytest.fixture
def argv(model, tmp_path):
    """Flags of a run that would be accepted."""
    (tmp_path / "data.jsonl").write_bytes(DATA)
    return flags(model, tmp_path / "data.jsonl", tmp_path / "out")


def with_flags(argv, *words):
    """The command line with `words` at its end, in place of its own values of their flags: none is given twice."""
    given = {str(word).partition("=")[0] for word in words}
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [*(word for pair in pairs if pair[0] not in given for word in pair), *words]


def mutated(rng, content):
    """`content` with one to three small damages."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 40])
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + n]
            case 2:
                content[at:at] = rng.randbytes(n)
            case 3:
                content[at:at] = content[at : at + n]
            case 4:
                del content[at:]
            case 5:
                content[at : at + 1] = rng.choice(
                    [b"\0", b'"', b"{", b"}", b"[", b"]", b",", b"-", b"\xff", b"9", b"\n"]
                )
    return bytes(content)


def mutated_json(rng, value):
    """A copy of `value` in which one item, at any depth, has become nonsense, is gone or has another name."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    match rng.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(rng.choice(NONSENSE[:30]))] = node.pop(key)
        case _:
            node[key] = rng.choice(NONSENSE)
    return value


def put(path, content):
    """Writes a new file: the one before may be mapped into memory."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def fuzz(end, argv, path, contents, least):
    """Writes each of `contents` to `path` and runs. At least `least` of them must be refused, by a line that names
    the directory, or the data that does not fit what it holds."""
    refused = set()
    for i, content in enumerate(contents):
        put(path, content)
        if error := end(argv, (path.name, i)):
            assert str(path.parent) in error or "data.jsonl:" in error, (i, error)
            refused.add(content)
    assert len(refused) >= least, len(refused)


def test_what_the_cases_start_from_is_accepted(end, argv, tmp_path):
    """Or every case below would prove nothing."""
    for script in (spin, family):
        assert end(argv, script=script) == ""
    assert end(argv[:-6], script=sft) == ""


# ---------------------------------------------------------------- data

FIRST_LINE = [
    b" \0", b"\0", b"{}", b"null", b"[]", b"[{}]", b'""', b"{", b"}", b"NaN", b"1e999999999", b"-", b"'a'",
    b"//x\n" + GOOD, b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, b"\xff\xfe{\0}\0", b"{" * 10_000, b'{"a":' * 10_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"[" * 990 + b"]" * 990, b"\x1f\x8b" + GOOD, GOOD.replace(b":", b"="),
    GOOD.replace(b'"', b"'"), GOOD.strip() * 2, GOOD.replace(b"abc", b"a\0c"), GOOD.replace(b"abc", b"a\tc"),
    GOOD.replace(b"\n", b","), GOOD.replace(b"\n", b"\r") * 2, GOOD.replace(b"}", b",}"), GOOD.replace(b"abc", b"\\x"),
    GOOD.replace(b"abc", b"\\u12"), GOOD.replace(b"abc", b"\\ud83d"), GOOD.replace(b"abc", b"\\ude00\\ud83d"),
    GOOD.replace(b'"abc"', b"9" * 10_000), GOOD.replace(b"abc", b"\xed\xa0\x80"), GOOD.replace(b"abc", b"\xc0\x80"),
    GOOD.replace(b"abc", b"\xf4\x90\x80\x80"), GOOD.replace(b"abc", b"a" * 2**24), GOOD.replace(b"abc", b"a" * 100_000),
    GOOD.replace(b"abc", b"").replace(b"EY1 B IY0", b""),
]  # fmt: skip


def record(**fields):
    return json.dumps({"prompt": "abc", "response": "EY1"} | fields)


def turns(*pairs):
    return json.dumps({"real": [dict(zip(("role", "content"), pair)) for pair in pairs]})


SECOND_LINE = [
    *(record(response=value) for value in NONSENSE if not isinstance(value, str)),
    *(record(response=value) for value in ("", " ", "\ud800", "a" * 100, EOS, EOS * 3, f"EY1{EOS}EY1")),
    *(record(prompt=value) for value in (None, 3, 1.5, True, "", " ", "\u3000", "\t\n", "\udfff", {}, ["abc"])),
    *(record(references=value) for value in (3, "", "EY1", {}, [], [[]], [""], [None], ["a", "\ud800"], deep(9))),
    *(json.dumps({"real": value}) for value in (None, 3, "", {}, [], [[]], [None], [{}], [{}, {}], deep(700))),
    turns(("user", "a")), turns(("assistant", "a"), ("user", "b")), turns(("user", "a"), ("user", "b")),
    turns(("user", "a"), ("user", "c")), turns(("system", "s"), ("assistant", "b")),
    turns(("user", 3), ("assistant", "b")), turns(("user", "a"), ("assistant", "")),
    turns(("user",), ("assistant", "b")), turns((None, "a"), ("assistant", "b")),
    turns((deep(700), "a"), ("assistant", "b")), turns(("\ud800", "a"), ("\r", "b")),
    turns(("user", "a"), ("assistant", "\ud800")), turns(("user", "a"), ("assistant", EOS)), '{"prompt": "abc"}',
    '{"response": "EY1"}', '{"Prompt": "a", "response": "b"}',
]  # fmt: skip


@pytest.mark.parametrize("line, contents", [(1, FIRST_LINE), (2, SECOND_LINE)])
def test_data(line, contents, end, argv, tmp_path):
    """The file and the line are named; and the second line of a gzipped file is a second line, too."""
    for number, content in enumerate(contents):
        content = (content if line == 1 else GOOD + content.encode()) + b"\n" + DATA
        for name in ("data.jsonl", "data.jsonl.gz"):
            (tmp_path / name).write_bytes(content if name == "data.jsonl" else gzip.compress(content, 1))
            argv[argv.index("--data") + 1] = tmp_path / name
            assert f"{name}:{line}: " in end(argv, (line, number)), number


def test_a_late_line_of_data_is_named_exactly(end, argv, tmp_path):
    """Behind more than a buffer of good lines."""
    (tmp_path / "data.jsonl").write_bytes(DATA * 100 + GOOD.replace(b"abc", b"a\xffc") + DATA * 100)
    assert "data.jsonl:2601: not readable as UTF-8" in end(argv)


def test_data_that_is_no_file_of_lines(end, argv, tmp_path, monkeypatch):
    """Folders, devices without end, a zip under the name of a gzip, and 64 MiB of zeros in a few bytes."""
    (tmp_path / "folder.gz").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(2**26), 1))
    (tmp_path / "empty.gz").write_bytes(b"")
    (tmp_path / "zip.gz").write_bytes(b"PK\3\4" + bytes(100))
    (tmp_path / "header.gz").write_bytes(gzip.compress(DATA)[:10])
    (tmp_path / "checksum.gz").write_bytes(gzip.compress(DATA)[:-8] + bytes(8))
    (tmp_path / "behind.gz").write_bytes(gzip.compress(DATA) + DATA)
    names = ["folder.gz", "loop", "bomb.gz", "empty.gz", "zip.gz", "header.gz", "checksum.gz", "behind.gz", "x" * 5000]
    for name in [*(tmp_path / name for name in names), "/dev/zero", "/dev/null", "a\0b", "-", "data.jsonl/x"]:
        for flag in ("--data", "--eval-data"):
            # A message shortens long names, and escapes a null character.
            known = "b: no such file" if name == "a\0b" else str(name)[:100]
            assert known in end(with_flags(argv, f"{flag}={name}"), name)


def test_mutated_data(end, argv, tmp_path):
    rng = random.Random(0)
    some = DATA[: 8 * len(GOOD)]
    fuzz(end, argv, tmp_path / "data.jsonl", [mutated(rng, some) for _ in range(60)], least=25)
    lines = [json.dumps(mutated_json(rng, json.loads(GOOD))).encode() + b"\n" + DATA for _ in range(40)]
    fuzz(end, argv, tmp_path / "data.jsonl", lines, least=20)
    argv[argv.index("--data") + 1] = tmp_path / "data.gz"
    fuzz(end, argv, tmp_path / "data.gz", [mutated(rng, gzip.compress(DATA)) for _ in range(40)], least=20)


# ---------------------------------------------------------------- config.json

SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads", "window_size")
NO_SIZE = [v for v in NONSENSE if type(v) is not int or not 1 <= v <= 3]
CONFIGS = [
    *({name: value} for name in SIZES for value in NO_SIZE),
    *({"intermediate_size": value} for value in NO_SIZE if value is not None), *({name: 2**24} for name in SIZES[:4]),
    {"hidden_size": 2**24, "vocab_size": 2**24, "num_heads": 1, "num_layers": 1024}, {"num_heads": 3},
    {"num_heads": 16, "hidden_size": 8}, {"hidden_size": 32}, {"num_layers": 1}, {"intermediate_size": 2**30},
    *({"num_layers": n, "attention_types": [[["global"], n]]} for n in (3, 1024, 1025, 10**9, 2**63)),
    *({"attention_types": value} for value in NONSENSE), *({"attention_types": [[kinds, 1]]} for kinds in NONSENSE),
    *({"attention_types": [[["global", "local"], n]]} for n in NONSENSE if n not in (1, True)),
    {"attention_types": [[[], 10**12]]}, {"attention_types": [[["global", "local"], 1]] * 9},
    {"attention_types": [["gl", 1]]}, {"attention_types": [[["global", "sparse"], 1]]},
    {"attention_types": [[["global", ["local"]], 1]]},
    *({name: v} for name in ("embed_dropout", "layer_norm_epsilon") for v in NONSENSE if v not in (0, 0.5)),
    {"initializer_range": 0}, {"activation_function": "gelu"}, {"tie_word_embeddings": False},
    {"activation_function": deep(700)},
    *({"eos_token_id": value} for value in NONSENSE if type(value) is not int or not 0 <= value < 396),
    {"eos_token_id": 396}, *({"model_type": value} for value in NONSENSE),
]  # fmt: skip


def test_config(end, argv, model):
    """Wrong types and impossible, enormous or contradicting sizes: the directory and the field are named."""
    good = json.loads((model / "config.json").read_text())
    for changes in CONFIGS:
        (model / "config.json").write_text(json.dumps(good | changes))
        error = end(argv, str(changes)[:100])
        assert str(model) in error, str(changes)[:100]
    assert end(argv, "each of them was refused") and len(CONFIGS) > 300


def test_config_that_is_no_json_object(end, argv, model):
    path = model / "config.json"
    good = path.read_bytes()
    contents = [
        b"", b"\0", b"[]", b"null", b'"x"', b"{", b"{}", b"9" * 5000, b'{"a":' * 100_000, good[:-3], good + b"}",
        good.replace(b'"', b"'"), good.replace(b"16", b"016"), b"\xff" + good, b"\xef\xbb\xbf" + good,
        b"\xff\xfe{\0}\0",
    ]  # fmt: skip
    fuzz(end, argv, path, contents, least=len(contents))
    path.unlink()
    assert "config.json" in end(argv)
    to_zeros, to_itself = (functools.partial(path.symlink_to, target) for target in ("/dev/zero", path))
    for replace in (path.mkdir, functools.partial(os.mkfifo, path), to_zeros, to_itself):
        replace()
        assert "config.json" in end(argv)
        path.rmdir() if path.is_dir() else path.unlink()


def test_mutated_config(end, argv, model):
    rng = random.Random(1)
    path = model / "config.json"
    good = path.read_bytes()
    fuzz(end, argv, path, [mutated(rng, good) for _ in range(60)], least=30)
    fuzz(end, argv, path, [json.dumps(mutated_json(rng, json.loads(good))).encode() for _ in range(80)], least=25)


# ---------------------------------------------------------------- sharded weights


@pytest.fixture
def shards(model):
    """The model's weights in two files and their index, which is returned."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


OUTSIDE = [
    "../secret.safetensors", "./../secret.safetensors", "..", ".", "", "/", "//", "~", "./a.safetensors",
    "a.safetensors/", "sub/c.safetensors", "sub", "sub/..", "../model/a.safetensors", "..\\secret.safetensors",
    "a.safetensors\0", "\0", "\ud800", "none.safetensors", "\u2025/secret.safetensors", "x" * 5000,
    "file:///etc/passwd", "config.json", "tokenizer.json", "model.safetensors.index.json", "pipe.safetensors",
    "loop.safetensors", "zero.bin", "%2e%2e/secret.safetensors", "a.safetensors ",
]  # fmt: skip


def test_index_that_leads_elsewhere(shards, end, argv, model):
    """Not one name leads out of the directory, nor to a pipe, a device or a file that is no weights. Files that are
    symbolic links, as those of the hub's cache are, stay welcome."""
    assert end(argv) == ""
    for file in ("a.safetensors", "b.safetensors"):
        (model.parent / "blobs").mkdir(exist_ok=True)
        shutil.move(model / file, model.parent / "blobs" / file)
        (model / file).symlink_to(f"../blobs/{file}")
    assert end(argv) == ""
    (model / "sub").mkdir()
    for copy in (model / "sub/c.safetensors", model.parent / "secret.safetensors"):
        shutil.copy(model / "b.safetensors", copy)
    os.mkfifo(model / "pipe.safetensors")
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    (model / "zero.bin").symlink_to("/dev/zero")
    for name in [*OUTSIDE, str(model / "b.safetensors"), str(model.parent / "secret.safetensors")]:
        moved = {key: name if file == "b.safetensors" else file for key, file in shards["weight_map"].items()}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
        assert str(model) in end(argv, name)


def test_index(shards, end, argv, model):
    path, files = model / "model.safetensors.index.json", shards["weight_map"]
    rng = random.Random(2)
    contents = [{"weight_map": value} for value in NONSENSE] + [{"weight_map": files | {HEAD: v}} for v in NONSENSE]
    contents += [[], {}, files, {"weight_map": {HEAD: "a.safetensors"}}, {"weight_map": list(files)}]
    fuzz(end, argv, path, [json.dumps(c).encode() for c in contents], least=len(contents))
    fuzz(end, argv, path, [mutated(rng, json.dumps(shards).encode()) for _ in range(40)], least=20)
    path.write_text(json.dumps(shards))
    (model / "b.safetensors").rename(model / "c.safetensors")
    assert "shard 'b.safetensors' is missing" in end(argv)
    twice = load_file(model / "c.safetensors") | load_file(model / "a.safetensors")
    save_file(twice, model / "b.safetensors")
    assert "b.safetensors: holds 'transformer" in end(argv)


# ---------------------------------------------------------------- safetensors


def safetensors(header, payload=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + payload


def headers(header, size):
    """Broken variants of a good header over `size` bytes of payload."""
    first, second = [key for key in header if key != "__metadata__"][:2]
    begin, stop = header[second]["data_offsets"]
    for key, values in {
        "dtype": [
            *NONSENSE, "I64", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "F128", "f32", "F16", "F64",
        ],
        "shape": [
            *NONSENSE, [-1], [0], [2**63], [2**64], [2**32, 2**32], [2**62, 4], [1] * 1000, [16, 0], [1.5], ["16"],
        ],
        "data_offsets": [
            *NONSENSE, [begin], [begin, stop, stop], [stop, begin], [begin - 4, stop - 4], [begin + 4, stop + 4],
            [-4, stop], [begin, stop - 1], [begin, 2**63], [2**64 - 4, 2**64], [size, size + stop - begin],
            [begin + 0.5, stop], [begin, 2**70], ["0", "64"], header[first]["data_offsets"],
        ],
    }.items():  # fmt: skip
        yield from (header | {second: header[second] | {key: value}} for value in values)
        yield header | {second: {k: v for k, v in header[second].items() if k != key}}
    yield from (header | {second: value} for value in NONSENSE)
    yield from (header | {"__metadata__": value} for value in NONSENSE if value not in (None, {}))
    yield {key: value for key, value in header.items() if key != second}
    yield header | {"extra": {"dtype": "F32", "shape": [0], "data_offsets": [size, size]}}
    yield {key + "x": value for key, value in header.items()}


def test_safetensors(end, argv, model):
    path = model / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    raw, payload = good[8 : 8 + length], good[8 + length :]
    header = json.loads(raw)
    assert end(argv) == ""
    contents = [safetensors(h, payload) for h in headers(header, len(payload))]
    lengths = (0, 1, length - 1, length + 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    contents += [safetensors(raw, payload, n) for n in lengths]
    no_headers = (b"", b"{", b"[]", b"null", b"9" * 9, b"\xff" * 64, b"{}" + b"\0" * 6, b"[" * 10**5)
    contents += [safetensors(h, payload) for h in (*no_headers, raw[:-1] + b"," + raw[1:])]
    contents += [
        good[:-1], good + b"\0", good * 2, good[8:], good[:7], good[:8], good[:100], b"", b"\0", bytes(8), bytes(64),
        b"PK\3\4" + good, b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
    ]  # fmt: skip
    duplicate = raw.rstrip()[:-1] + b',"' + HEAD.encode() + b'":' + json.dumps(header[HEAD]).encode() + b"}"
    fuzz(end, argv, path, contents, least=len(contents))
    fuzz(end, argv, path, [safetensors(duplicate, payload)], least=0)
    rng = random.Random(3)
    fuzz(end, argv, path, [mutated(rng, good[: 8 + length]) + payload for _ in range(60)], least=30)


def test_weights_of_other_types_and_shapes(end, argv, model):
    """Integers and 8-bit floats are refused by name; the four floating-point types are read."""
    path, tensors = model / "model.safetensors", load_file(model / "model.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        put(path, save({key: t.to(dtype) for key, t in tensors.items()}))
        assert end(argv, dtype) == ""
    no_weights = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    for dtype in (*no_weights, torch.float8_e5m2):
        put(path, save(tensors | {HEAD: tensors[HEAD].to(dtype)}))
        assert f"model.safetensors: '{HEAD}' is {dtype}, expected one of" in end(argv, dtype)
    for shape in ((), (0,), (396 * 16,), (16, 396), (396, 16, 1), (395, 16), (397, 16)):
        put(path, save(tensors | {HEAD: torch.zeros(shape)}))
        assert f"{HEAD} has shape {shape}" in end(argv, shape)


def test_weights_far_larger_than_the_model(shards, end, argv, model):
    """768 MiB in a sparse file is mapped, seen not to fit and never converted."""
    head = {HEAD: {"dtype": "F16", "shape": [3 * 2**27], "data_offsets": [0, 3 * 2**28]}}
    with open(model / "c.safetensors", "wb") as file:
        file.write(safetensors(head))
        file.truncate(file.tell() + 3 * 2**28)
    rest = load_file(model / "a.safetensors") | load_file(model / "b.safetensors")
    del rest[HEAD]
    put(model / "a.safetensors", save(rest))
    index = {"weight_map": dict.fromkeys(rest, "a.safetensors") | {HEAD: "c.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{HEAD} has shape ({3 * 2**27},)" in end(argv)


# ---------------------------------------------------------------- pytorch_model.bin


class Evil:
    """Unpickling it calls `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def test_pickles(end, argv, model, tmp_path, monkeypatch):
    """Whatever a pickle says: nothing is executed, and one line names the file."""
    canary = tmp_path / "canary"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    torch.save(tensors, path)
    assert end(argv) == ""
    good = path.read_bytes()

    def saved(value, **options):
        buffer = BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    def zipped(pickled, record="data.pkl"):
        buffer = BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(f"archive/{record}", pickled)
            file.writestr("archive/version", "3\n")
        return buffer.getvalue()

    evil = [
        Evil(os.system, f"touch {canary}"), Evil(eval, f"open({str(canary)!r}, 'w')"), Evil(open, str(canary), "w"),
        Evil(exec, f"open({str(canary)!r}, 'w')"), Evil(os.mkdir, str(canary)), Evil(__import__, "os"),
        Evil(__import__, "antigravity"), Evil(bytearray, 10**13), Evil(sys.exit, 0), Evil(torch.load, str(path)),
    ]  # fmt: skip
    contents = [form(e) for e in evil for form in (pickle.dumps, lambda e: zipped(pickle.dumps(e, 2)), saved)]
    contents += [saved({HEAD: e}) for e in evil] + [saved({e: tensors[HEAD]}) for e in evil[:1]]
    huge = torch.zeros(1).expand(2**28, 2**28)
    wide = torch.zeros(1, dtype=torch.float64).expand(396, 16)
    values = [
        None, 3, "x", [], {}, [tensors], list(tensors.values()), tensors[HEAD], {"model": tensors},
        {"state_dict": [tensors]}, {**tensors, "epoch": 3}, {**tensors, 3: tensors[HEAD]}, {None: tensors[HEAD]},
        {HEAD: None}, {HEAD: [0.0]}, {HEAD: {HEAD: huge}}, {**tensors, HEAD: huge}, {**tensors, HEAD: wide},
        {**tensors, HEAD: torch.zeros(1).expand(396, 16)}, {**tensors, HEAD: tensors[HEAD].to_sparse()},
        {**tensors, HEAD: tensors[HEAD].to("meta")}, {**tensors, HEAD: tensors[HEAD].int()},
        {**tensors, HEAD: tensors[HEAD].cfloat()}, {**tensors, HEAD: tensors[HEAD].t()}, {**tensors, "": tensors[HEAD]},
        {**tensors, "\ud800": tensors[HEAD]}, {HEAD: torch.nn.Parameter(tensors[HEAD])}, GPTNeo.__init__, torch.float32,
        deep(100),
    ]  # fmt: skip
    contents += [saved(v) for v in values]
    contents += [saved(v, _use_new_zipfile_serialization=False) for v in values]
    contents += [good[:n] for n in (0, 1, 3, 100, 1000, len(good) // 2, len(good) - 1)]
    contents += [
        b"hello\n" * 9, b"\x80", b"\x80\x02.", b"PK\3\4", zipped(b""), zipped(pickle.dumps({})), zipped(b"}", "x"),
        zipped(b"", "constants.pkl"), pickle.dumps(tensors[HEAD].tolist()),
    ]  # fmt: skip
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    contents += [buffer.getvalue(), bytes(10**5), (model / "tokenizer.json").read_bytes()]
    fuzz(end, argv, path, contents, least=len(set(contents)))
    rng = random.Random(4)
    fuzz(end, argv, path, [mutated(rng, good) for _ in range(40)], least=15)
    legacy = saved(tensors, _use_new_zipfile_serialization=False)
    fuzz(end, argv, path, [mutated(rng, legacy[:6000]) + legacy[6000:] for _ in range(40)], least=15)
    assert not canary.exists()


# ---------------------------------------------------------------- tokenizers


def nested(kind, inner, depth):
    part = {"type": "Lowercase"} if kind == "normalizer" else {"type": "Digits", "individual_digits": True}
    for _ in range(depth):
        part = {"type": "Sequence", inner: [part]}
    return {kind: part}


def split(regex):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}}


def replace(pattern, content):
    return {"normalizer": {"type": "Replace", "pattern": pattern, "content": content}}


def template(single):
    return {"post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}}


def added(id, content):
    token = {"id": id, "content": content, "special": False, "normalized": False}
    return {"added_tokens": [token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)]}


PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
TOKENIZERS = [
    *({part: value} for part in PARTS for value in NONSENSE if value not in (None, [[]])),
    *({"added_tokens": value} for value in NONSENSE if value != []), *({"version": value} for value in NONSENSE),
    *(split(regex) for regex in ("(", "[", "*", "(?<", "\\", "(?P<x")), split("(a+)+$"), split("((a|b|c|\\s)+)+$"),
    replace({"Regex": "[\\s\\S]"}, ""), replace({"Regex": "("}, ""), replace({"String": ""}, "a"), replace({}, ""),
    nested("normalizer", "normalizers", 200), nested("pre_tokenizer", "pretokenizers", 200),
    *({"normalizer": {"type": "Precompiled", "precompiled_charsmap": c}} for c in ("", "AAAA", "BAAAAAAAAAAA", None)),
    {"normalizer": {"type": "Prepend", "prepend": ""}}, {"normalizer": {"type": "Nope"}}, {"decoder": {"type": "Nope"}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": ""}},
    {"decoder": {"type": "Strip", "content": "", "start": 9, "stop": 9}}, {"pre_tokenizer": {"type": "Digits"}},
    template([]), template([{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]),
    template([{"Sequence": {"id": "C", "type_id": 0}}]),
    {"post_processor": {"type": "BertProcessing", "sep": ["x", -1], "cls": ["y", 0]}}, added(396, "beyond"),
    added(2**32 - 1, "x"), added(-1, "x"), added(0, EOS), added(2**40, "x"), {"added_tokens": []},
]  # fmt: skip
MODELS = [
    *({"vocab": value} for value in NONSENSE), *({"merges": value} for value in NONSENSE if value != []),
    {"dropout": 1.5}, *({"type": value} for value in NONSENSE if value is not None), {"dropout": -1},
    {"continuing_subword_prefix": "\u00e9"}, {"merges": ["a"]}, {"merges": ["a b c"]}, {"merges": [["a", "nope"]]},
    {"merges": [["a"]]}, {"vocab": {"a": -1}}, {"vocab": {"a": 2**32}}, {"vocab": {"a": 0.5}},
    {"vocab": {"a": 0, "b": 0}, "merges": []}, {"vocab": {"a": 5000}, "merges": []}, {"vocab": {"!": 0}, "merges": []},
    {"unk_token": "?", "vocab": {EOS: 393}, "merges": []},
]  # fmt: skip
OTHER_MODELS = [
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}, {"type": "Unigram", "unk_id": None, "vocab": []},
    {"type": "Unigram", "unk_id": None, "vocab": [[EOS, 0.0]]}, {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0]]},
    {"type": "Unigram", "unk_id": -1, "vocab": [["a", 0.0]]}, {"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]},
    {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {EOS: 393}}, {"type": "WordLevel", "vocab": {EOS: 393}},
    {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
     "vocab": {EOS: 393}},
]  # fmt: skip


def test_tokenizer(end, argv, model):
    """In some of these the Rust code of tokenizers panics, some of them in two threads at once. What it prints of that
    is not seen. The line names tokenizer.json, or the data where that cannot be encoded."""
    path = model / "tokenizer.json"
    raw = path.read_bytes()
    good = json.loads(raw)
    contents = [json.dumps(good | changes).encode() for changes in TOKENIZERS]
    contents += [json.dumps(good | {"model": good["model"] | changes}).encode() for changes in MODELS]
    contents += [json.dumps(good | {"model": other}).encode() for other in [*OTHER_MODELS, *NONSENSE]]
    contents += [json.dumps({k: v for k, v in good.items() if k != key}).encode() for key in ("added_tokens", "model")]
    contents += [raw[:n] for n in range(0, len(raw), len(raw) // 10)]
    contents += [raw + b"}", b"\xff" + raw, b"\0", b"[" * 10**5, b"{}", b"[]", b"null"]
    for number, content in enumerate(contents):
        put(path, content)
        error = end(argv, number)
        assert "model/tokenizer.json: " in error or "data.jsonl:" in error, (number, error)


def test_mutated_tokenizer(end, argv, model):
    rng = random.Random(6)
    path = model / "tokenizer.json"
    good = path.read_bytes()
    refused = 0
    for i in range(100):
        put(path, mutated(rng, good) if i % 2 else json.dumps(mutated_json(rng, json.loads(good))).encode())
        refused += bool(end(argv, i))
    assert refused >= 50, refused


def test_vocab_and_merges(end, argv, model):
    argv += ["--template", "{prompt}"]
    good = json.loads((model / "tokenizer.json").read_text())["model"]
    vocab, merges = model / "vocab.json", model / "merges.txt"
    (model / "tokenizer.json").unlink()
    words = good["vocab"] | {EOS: 393, "w394": 394, "w395": 395}
    lines = "\n".join(["#version: 0.2", *map(" ".join, good["merges"]), ""])
    put(vocab, json.dumps(words).encode())
    put(merges, lines.encode())
    assert end(argv) == ""
    fuzz(
        end,
        argv,
        merges,
        [b"\xff", b"a", b"a b c", b"\0", b"nope nope", lines.encode() + b"\xff", lines.encode() + b"x"],
        least=7,
    )
    put(merges, lines.encode())
    values = [
        *NONSENSE,
        *(words | {"x": v} for v in NONSENSE),
        {"a": 1},
        {EOS: 393},
        words | {"x": 396},
        words | {"x": 395},
    ]
    fuzz(end, argv, vocab, [json.dumps(v).encode() for v in values] + [b"", b"{", b"\xff{}"], least=len(values))
    rng = random.Random(7)
    fuzz(end, argv, vocab, [mutated(rng, json.dumps(words).encode()) for _ in range(40)], least=20)
    put(vocab, json.dumps(words).encode())
    fuzz(end, argv, merges, [mutated(rng, lines.encode()) for _ in range(40)], least=20)
    for file in (merges, vocab):
        file.unlink()
        assert "no tokenizer, expected tokenizer.json, or vocab.json and merges.txt" in end(argv)
        file.mkdir()
        assert "no tokenizer" in end(argv)
        file.rmdir()


# ---------------------------------------------------------------- flags


NUMBERS = [
    "eval-share", "beta", "temperature", "top-p", "alpha", "lora-alpha", "lora-dropout", "lr", "warmup",
    "weight-decay", "clip", "min-win", "save-minutes",
]  # fmt: skip
COUNTS = [
    "eval-limit", "iterations", "prompts", "max-new-tokens", "top-k", "gen-batch", "gen-tokens", "rank", "epochs",
    "batch", "micro-tokens", "seed", "history",
]  # fmt: skip
NO_NUMBERS = ("", " ", "x", "nan", "-inf", "-1", "1e", "0x1", "--1", "1 2", "\0", "\u00bd")
NO_COUNTS = ("", "x", "1.5", "nan", "inf", "1e3", "9" * 5000, "1,,2", "\x1b", "\u00b2")
NO_LISTS = ("1,2,3", ",", "1,", "0", "1;2", "[1]", "1,-1")
CHOICES = ("overlong", "unfinished", "optimizer", "precision", "loss", "best")
NO_DEVICES = ("", "cuda:", "cuda:-1", "cuda:100", "CPU", "cpu:0", "meta", "mps", "cuda:0,1", "cpu\0", " cpu")
NO_LAYERS = ("", ",", "q_proj,", ".", "*", "wte", "attn", "h", "ln_1", "lora_A", "\0", "q_proj;k_proj")
NO_FLAGS = ("mix-previous", "checkpoint", "compile", "x", "learning-rate", "modell", "from_scratch")
FLAGS = [
    *([f"--{name}={value}"] for name in NUMBERS for value in NO_NUMBERS),
    *([f"--{name}={value}"] for name in COUNTS for value in NO_COUNTS),
    *([f"--{name}={2**31}"] for name in COUNTS if name != "epochs"),
    *([f"--{name}=-1"] for name in COUNTS if name != "seed"),
    *([f"--{name}={value}"] for name in ("beta", "lr", "epochs") for value in NO_LISTS),
    *([f"--{name}"] for name in (*NUMBERS, *COUNTS, "model", "data", "out", "template", "device", "lora-targets")),
    *([f"--{name}={value}"] for name in CHOICES for value in ("", "x", "KEEP", "fp\ufb0132", "\0")),
    *([f"--device={value}"] for value in NO_DEVICES), *([f"--lora-targets={value}"] for value in NO_LAYERS),
    *([f"--template={value}"] for value in ("", "prompt", "{}", "{ prompt }", "{0}", "{prompt")),
    *([f"--{name}=1"] for name in NO_FLAGS),
    ["--mix-previous", "yes"], ["x"], ["-x"], ["---lr", "1"], ["--lr", "1", "2"], ["--", "--lr", "1"], ["--lr", "--lr"],
    ["-1"], ["--out="], ["--out", "/dev/null"], ["--out", "/dev/null/x"], ["--model="], ["--model", "/dev/null"],
    ["--model", "\0"], ["--model", "~"], ["--model", "a/b/c"], ["--model", "../../.."], ["--model", "x" * 5000],
    ["--model", "https://x.y/z"], ["--model", "owner/name"], ["--model", "-/-"], ["--data="], ["--eval-data", "/"],
    ["--eval-data", "x" * 5000], ["--rank=17"], ["--lr=1,1", "--iterations=3"], ["--max-new-tokens=64"],
    ["--temperature=1e-9"], ["--from-scratch"], ["@"], ["@/"], ["@none.args"], ["@" + "x" * 5000],
]  # fmt: skip


@pytest.mark.parametrize("script", [spin, family])
def test_flags(script, end, argv):
    """The flag is named, or the word that is none. spin.py refuses family.py's own flags whatever their value."""
    for case in FLAGS:
        error, flag = end(with_flags(argv, *case), case, script), case[0].partition("=")[0]
        assert "is given twice" not in error, case
        named = "target" if flag == "--lora-targets" else flag.lstrip("-@")
        assert error and (named[:40] in error or case[-1][:40] in error), (case, error)


RECIPES = [
    b'--model "x', b"--model 'x", b"--lr \\", b"\xff\xfe", b"\0", bytes(range(256)), b"--lr", b"--lr x", b"--nope 1",
    b"x", b'""', b"--lr 1e-3 2", b"--template '{prompt'", b"--model\n\n", b"-", b"--data $NOPE/x",
    b"\x7fELF" + bytes(64), b"PK\3\4", b"--lr=nan\n" * 9, b"@none.args", b"@", b"--model a\0b", b"--data a\0b",
    b"--lr 1e-3,", b"\xef\xbb\xbf--lr 1",
]  # fmt: skip


def test_recipes(end, argv, tmp_path):
    """The command line has no flag of the recipe, which it would override."""
    path = tmp_path / "r.args"

    def end_of(recipe, case):
        path.write_bytes(recipe)
        pairs = zip(argv[::2], argv[1::2], strict=True)
        return end([f"@{path}", *(word for pair in pairs if pair[0].encode() not in recipe for word in pair)], case)

    for case in RECIPES:
        assert end_of(case, case), case
    good = b"--lr 1e-3 --epochs 1\n--template '# {prompt}\\n' # a comment\n--beta 0.1\n"
    assert end_of(good, "good") == ""
    rng = random.Random(8)
    refused = sum(bool(end_of(mutated(rng, good), i)) for i in range(60))
    assert refused >= 30, refused


@pytest.mark.parametrize(
    "case",
    [
        ["--device", "cuda:\u0663"], ["--device", "cuda:00"], ["--device", "cuda:01"], ["--template", "\udcff{prompt}"],
        ["--out", "none/a\0b"], ["--model", "pronounce/README.md"],
    ],
)  # fmt: skip
def test_more_flags(case, end, argv, monkeypatch):
    """Digits of other scripts and leading zeros, bytes that are no text, and a path that looks like a hub id."""
    monkeypatch.chdir(ROOT)
    error = end(with_flags(argv, *case), case)
    assert case[0] in error and "hub says" not in error, error


@pytest.mark.parametrize("loop", [["a"], ["a", "b"], ["a", "a a"], ["a", "b", "c"]])
def test_recipes_that_read_each_other(loop, end, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, following in zip(loop, loop[1:] + loop[:1]):
        (tmp_path / name[0]).write_text("\n".join(f"@{f}" for f in following.split()))
    assert "@a" in end([*argv, "@a"])


@pytest.mark.parametrize(
    "name", ["a\rb", "a\x0bb", "a\x1b[2Jb", "a\x85b", "a\u2028b", "a\0b", "a\u202eb", "a\nb", "\udcff"]
)
def test_names_with_control_characters(name, end, argv, model):
    """What is not printable is escaped: it cannot begin a line, clear the screen or turn the text around."""
    tensors = load_file(model / "model.safetensors")
    torch.save(tensors | {name: tensors[HEAD]}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    named = [[flag, name] for flag in ("--data", "--model", "--eval-data")]
    for extra in ([], [name], ["--" + name], ["--out", f"/dev/null/{name}"], *named):
        error = end(with_flags(argv, *extra), extra)
        assert error.strip("\n").isprintable(), extra


def test_from_scratch_larger_than_memory(end, argv, model, tmp_path):
    """There are no weights to contradict such a config."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**24, "hidden_size": 2**14}))
    argv = flags(model, tmp_path / "data.jsonl", tmp_path / "out", rank=0, from_scratch=True, beta=None)
    assert f"{model}: training needs more than" in end(argv, script=sft)


# ---------------------------------------------------------------- adapters


def test_adapters(start, tmp_path):
    """lora.load_adapter: a ValueError or OSError that names the file or its folder, and the model is left as it was."""
    model = GPTNeo.from_pretrained(start)
    before = list(model.state_dict())
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    lora.add_lora(model, 2, 4.0)
    lora.save_adapter(model, tmp_path)
    lora.remove_lora(model)
    good, tensors = json.loads(config.read_text()), {key: t.clone() for key, t in load_file(weights).items()}

    def refused(case):
        with pytest.raises((ValueError, OSError), match=str(tmp_path)):
            lora.load_adapter(model, tmp_path)
            pytest.fail(str(case)[:200])
        assert list(model.state_dict()) == before

    changes = [{key: v} for key in ("r", "lora_alpha", "lora_dropout", "target_modules") for v in NONSENSE]
    fine = [{"lora_dropout": v} for v in (0, 0.5)] + [{"lora_alpha": v} for v in (-1, -0.5, 0, 0.5, 1, 3, 10**9)]
    changes = [c for c in changes if c not in fine or type(*c.values()) is bool]
    others = [v for v in NONSENSE if v not in (None, False, [], {})]
    changes += [{key: v} for key in ("peft_type", "bias", "nope", "use_dora") for v in others]
    no_targets = (["nope"], [3], [None], [["q_proj"]], "all-linear", ["transformer"], ["q_proj", ""])
    changes += [{"target_modules": v} for v in no_targets]
    for change in changes:
        config.write_text(json.dumps(good | change))
        refused(change)
    huge = b'{"r": ' + b"9" * 5000 + b"}"
    for content in (b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff", b"{}", b"[" * 10**5, huge):
        config.write_bytes(content)
        refused(content)
    config.write_text(json.dumps(good))
    key = next(iter(tensors))
    raw = weights.read_bytes()
    rng = random.Random(9)
    damaged = [tensors | {key: t} for t in (torch.zeros(3), tensors[key].int(), tensors[key].to(torch.float8_e5m2))]
    damaged = [b"", b"\0", raw[:-1], raw + b"\0", *(save(d) for d in [*damaged, tensors | {"x": torch.zeros(1)}, {}])]
    for content in damaged:
        put(weights, content)
        refused(content)
    for i in range(60):
        put(weights, mutated(rng, raw[:2000]) + raw[2000:])
        try:
            lora.load_adapter(model, tmp_path)
            lora.remove_lora(model)
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error), i
    weights.unlink()
    refused("no weights")
