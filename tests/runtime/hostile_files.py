"""Builds malformed GGUF files by hand, each named after the bug it once was."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_Q4_0, TYPE_I8 = 0, 2, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """One malformed file: why it exists, and what its refusal must mention."""

    name: str
    data: bytes
    reason: str
    error: str = "ModelFileError"


def text(raw: bytes | str) -> bytes:
    """Return a string as GGUF stores it."""
    data = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(data)) + data


def pair(key: bytes | str, value_type: int, payload: bytes) -> bytes:
    """Return one key-value pair."""
    return text(key) + struct.pack("<I", value_type) + payload


def array(key: str, item: int, n: int, payload: bytes) -> bytes:
    """Return an array that claims `n` items, whatever it holds."""
    return pair(key, ARRAY, struct.pack("<IQ", item, n) + payload)


def strings(key: str, values: Sequence[bytes | str]) -> bytes:
    """Return an array of strings."""
    return array(key, STRING, len(values), b"".join(text(value) for value in values))


def ints(key: str, values: Sequence[int]) -> bytes:
    """Return an array of INT32."""
    return array(key, I32, len(values), struct.pack(f"<{len(values)}i", *values))


def tensor(
    name: bytes | str, ne: Sequence[int], ggml_type: int = TYPE_F32, offset: int = 0
) -> bytes:
    """Return one row of the tensor table; extents wrap to unsigned like a C writer's."""
    extents = b"".join(struct.pack("<Q", extent % 2**64) for extent in ne)
    tail = struct.pack("<IQ", ggml_type % 2**32, offset % 2**64)
    return text(name) + struct.pack("<I", len(ne)) + extents + tail


def gguf(
    pairs: Sequence[bytes],
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    head: tuple[int, int | None, int | None] = (3, None, None),
    alignment: int = 32,
) -> bytes:
    """Return a file; `head` is (version, tensor count, key count), None meaning the truth."""
    version, n_tensors, n_pairs = head
    counts = [len(tensors) if n_tensors is None else n_tensors]
    counts.append(len(pairs) if n_pairs is None else n_pairs)
    start = b"GGUF" + struct.pack("<IQQ", version, *(count % 2**64 for count in counts))
    file = start + b"".join(pairs) + b"".join(tensors)
    if tensors:
        file += b"\0" * (-len(file) % alignment)
    return file + data


ARCH = pair("general.architecture", STRING, text("llama"))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def vocab(kind: str = "gpt2", /, **changes: bytes | None) -> bytes:
    """Return a file with a valid vocabulary, some of its pairs replaced or, if None, left out.

    Keywords only name the pairs; a new name adds a pair.
    """
    tokens = ["<s>", "</s>", "<unk>", *BYTES] if kind == "llama" else ["<s>", "</s>", *_GPT2]
    types = [3, 3, 2] + [6] * 256 if kind == "llama" else [3, 3] + [1] * len(_GPT2)
    ggml = "tokenizer.ggml."
    pairs: dict[str, bytes | None] = {
        "architecture": ARCH,
        "model": pair(ggml + "model", STRING, text(kind)),
        "tokens": strings(ggml + "tokens", tokens),
        "token_type": ints(ggml + "token_type", types),
        "bos_token_id": pair(ggml + "bos_token_id", U32, struct.pack("<I", 0)),
        "eos_token_id": pair(ggml + "eos_token_id", U32, struct.pack("<I", 1)),
    }
    if kind == "gpt2":
        pairs["merges"] = strings(ggml + "merges", ["a b", "ab c"])
    else:
        scores = struct.pack(f"<{len(tokens)}f", *range(len(tokens)))
        pairs["scores"] = array(ggml + "scores", F32, len(tokens), scores)
    pairs.update(changes)
    return gguf([value for value in pairs.values() if value is not None])


_GPT2 = [*"abcdefghijklmnopqrstuvwxyz", "ab", "abc"]


def valid_files() -> dict[str, bytes]:
    """Return files that must be accepted, so that refusing everything fails a test."""
    two = [tensor("a", [8, 3]), tensor("b", [32, 2], TYPE_Q4_0, 96)]
    return {
        "valid-tensors": gguf([ARCH], two, b"\1" * 96 + b"\2" * 36 + b"\0" * 28),
        "valid-no-padding": gguf([ARCH], two, b"\1" * 96 + b"\2" * 36),
        "valid-version-2": gguf([ARCH], head=(2, None, None)),
        "valid-bpe": vocab("gpt2"),
        "valid-spm": vocab("llama"),
        "valid-empty-token": vocab(
            "gpt2",
            tokens=strings("tokenizer.ggml.tokens", ["<s>", "</s>", ""]),
            token_type=ints("tokenizer.ggml.token_type", [3, 3, 1]),
        ),
    }


def case(name: str, data: bytes, reason: str, error: str = "ModelFileError") -> Hostile:
    """Return one case."""
    return Hostile(name=name, data=data, reason=reason, error=error)


def frame_cases() -> Iterator[Hostile]:
    """Yield files whose magic, version, counts or lengths are wrong."""
    yield case("empty-file", b"", "0 bytes")
    yield case("magic-only", b"GGUF", "4 bytes")
    yield case("wrong-magic", b"GGML" + b"\0" * 60, "not a GGUF file")
    yield case("zip-file", b"PK\3\4" + b"\0" * 60, "not a GGUF file")
    for version in (0, 1, 4, 2**32 - 1):
        data = gguf([ARCH], head=(version, None, None))
        yield case(f"version-{version}", data, f"version {version}")
    yield case("big-endian", gguf([ARCH], head=(3 << 24, None, None)), "big-endian")
    for count in (2**16 + 1, 2**31, 2**62, 2**63, -1):
        data = gguf([ARCH], head=(3, count, None))
        yield case(f"GHSA-vgg9-87g3-85w8-tensor-count-{count}", data, "tensors")
        data = gguf([ARCH], head=(3, None, count))
        yield case(f"CVE-2025-0315-key-count-{count}", data, "keys")
    yield case("tensor-count-over-file", gguf([ARCH], head=(3, 100, None)), "can hold")
    yield case("key-count-over-file", gguf([ARCH], head=(3, None, 100)), "can hold")
    yield case("key-count-one-more", gguf([ARCH], head=(3, None, 2)), "the length of key 1")
    for length in (2**64 - 1, 2**63, 2**32, 10**6):
        key = struct.pack("<Q", length) + b"general.name"
        yield case(f"CVE-2024-12055-key-length-{length}", gguf([key + b"\0" * 40]), "key 0")
        value = pair("general.name", STRING, struct.pack("<Q", length) + b"x" * 40)
        yield case(f"CVE-2024-12055-string-length-{length}", gguf([value]), "'general.name' needs")
        item = array("a", STRING, 1, struct.pack("<Q", length) + b"x" * 40)
        yield case(f"CVE-2024-12055-array-string-{length}", gguf([item]), "runs past the end")


def value_cases() -> Iterator[Hostile]:
    """Yield files whose keys or values are wrong."""
    yield case("key-empty", gguf([pair("", U8, b"\1"), ARCH]), "0 bytes")
    long_key = gguf([pair(b"k" * 65536, U8, b"\1")])
    yield case("key-too-long", long_key, "65536 bytes")
    yield case("key-not-utf8", gguf([pair(b"\xff\xfe", U32, b"\0" * 4)]), "not UTF-8")
    yield case("key-zero-byte", gguf([pair(b"a\0b", U32, b"\0" * 4)]), "zero byte")
    yield case("key-twice", gguf([ARCH, ARCH]), "appears twice")
    for number in (13, 255, 2**32 - 1):
        yield case(f"value-type-{number}", gguf([pair("a", number, b"\0" * 8)]), "value type")
        data = gguf([array("a", number, 1, b"\0" * 8)])
        yield case(f"item-type-{number}", data, "value type")
    for n in (2**61, 2**63, 2**64 - 1, 1000):
        data = gguf([array("a", U64, n, b"\0" * 64)])
        yield case(f"CVE-2025-0312-array-length-{n}", data, "'a' needs")
        data = gguf([array("a", STRING, n, b"\0" * 64)])
        yield case(f"CVE-2025-0315-string-count-{n}", data, "strings")
    nested = struct.pack("<IQ", ARRAY, 1) * 20000
    yield case("nested-arrays", gguf([pair("a", ARRAY, nested)]), "array of arrays")
    yield case("bool-2", gguf([pair("a", BOOL, b"\2")]), "not 0 or 1")
    yield case("value-cut", gguf([ARCH, pair("abc", U64, b"\0" * 3)]), "'abc' needs 8")
    yield case("type-cut", gguf([ARCH, text("abc") + b"\0\0\0"]), "the type of 'abc' needs 4")


def alignment_cases() -> Iterator[Hostile]:
    """Yield files whose alignment is wrong."""

    def align(payload: bytes, value_type: int = U32) -> bytes:
        extra = pair("general.alignment", value_type, payload)
        return gguf([ARCH, extra], [tensor("a", [8])], b"\0" * 32)

    bugs = {
        0: "CVE-2025-0317-alignment-0",
        1: "alignment-1",
        3: "alignment-3",
        48: "alignment-48",
        2**20: "alignment-1-MiB",
        2**31: "L24997-alignment-0x80000000",
    }
    for value, name in bugs.items():
        yield case(name, align(struct.pack("<I", value)), f"is {value}; it must be a power")
    yield case("L26318-alignment-u64", align(struct.pack("<Q", 32), U64), "UINT64")
    yield case("L26318-alignment-i32", align(struct.pack("<I", 32), I32), "INT32")
    yield case("L26318-alignment-string", align(text("32"), STRING), "STRING")


def extent_cases() -> Iterator[Hostile]:
    """Yield files with a tensor of impossible shape, type or place."""

    def one(ne: Sequence[int], ggml_type: int = TYPE_F32, offset: int = 0) -> bytes:
        return gguf([ARCH], [tensor("t", ne, ggml_type, offset)], b"\0" * 64)

    yield case("CVE-2026-7482-extent-past-end", one([1000]), "needs 4000 bytes")
    yield case("CVE-2026-7482-offset-past-end", one([8], offset=64), "ends at byte")
    yield case("CVE-2026-7482-one-byte-short", one([32])[:-65], "'t' ")
    for offset in (2**63, 2**64 - 32, 2**40):
        yield case(f"offset-{offset}", one([8], offset=offset), "ends at byte")
    yield case("offset-misaligned", one([1], offset=4), "no multiple of 32")
    yield case("GHSA-96jg-mvhq-q7q7-product-wraps", one([2**32, 2**32]), "bytes; the whole")
    yield case("L24759-product-wraps-to-0", one([2**62, 4, 4, 4]), "bytes; the whole")
    yield case("L24759-row-size-wraps", one([2**62]), "bytes; the whole")
    yield case("L15711-padding-wraps", one([2**63 - 1], TYPE_I8), "bytes; the whole")
    yield case("extent-0", one([0]), "extent of 0")
    yield case("extent-0-hides-size", one([2**62, 0]), "extent of 0")
    yield case("extent-negative", one([-1]), "negative extent -1")
    yield case("extents-negative-twice", one([-4, -2]), "negative extent -4")
    yield case("dimensions-0", one([]), "0 dimensions")
    yield case("dimensions-5", one([1] * 5), "5 dimensions")
    many = text("t") + struct.pack("<I", 2**32 - 1) + b"\0" * 64
    yield case("dimensions-2^32-1", gguf([ARCH], [many]), "4294967295 dimensions")
    for number in (4, 31, 36, 43, 1000, -1):
        yield case(f"type-{number}", one([32], number), f"type {number % 2**32}")
    yield case("row-no-multiple-of-block", one([33], TYPE_Q4_0), "multiple of 32")


def layout_cases() -> Iterator[Hostile]:
    """Yield files whose tensors collide, or do not fill the file."""

    def two(first: bytes, second: bytes, n_bytes: int = 128) -> bytes:
        return gguf([ARCH], [first, second], b"\0" * n_bytes)

    same = tensor("same", [8])
    yield case("tensor-twice", two(same, tensor("same", [8], offset=32)), "appears twice")
    yield case("overlap-same-offset", two(tensor("a", [8]), tensor("b", [8])), "overlaps")
    yield case(
        "overlap-partial", two(tensor("a", [24]), tensor("b", [8], TYPE_F32, 64)), "overlaps"
    )
    yield case("gap", two(tensor("a", [8]), tensor("b", [8], offset=64)), "leaves a gap")
    order = two(tensor("a", [8], offset=32), tensor("b", [8]))
    yield case("out-of-order", order, "leaves a gap")
    yield case("name-empty", gguf([], [tensor("", [8])], b"\0" * 32), "0 bytes")
    yield case("name-64-bytes", gguf([], [tensor("n" * 64, [8])], b"\0" * 32), "64 bytes")
    yield case("name-not-utf8", gguf([], [tensor(b"\xc3\x28", [8])], b"\0" * 32), "not UTF-8")
    yield case("name-zero-byte", gguf([], [tensor(b"a\0", [8])], b"\0" * 32), "zero byte")
    yield case("table-cut", gguf([ARCH], [tensor("t", [8])])[:-40], "an extent of tensor")
    yield case("data-cut", gguf([ARCH], [tensor("t", [8])], b"\0" * 31), "truncated")
    yield case("data-missing", gguf([ARCH], [tensor("t", [8])]), "truncated")
    yield case("trailing-data", gguf([ARCH], [tensor("t", [8])], b"\0" * 33), "bytes follow")
    yield case("trailing-data-no-tensor", gguf([ARCH], (), b"\0" * 64), "bytes follow")


GGML = "tokenizer.ggml."


def vocab_case(name: str, reason: str, data: bytes, error: str = "ModelFileError") -> Hostile:
    """Return one case about vocabularies."""
    return case(f"vocab-{name}", data, reason, error)


def spm(**changes: bytes | None) -> bytes:
    """Return a changed SentencePiece vocabulary."""
    return vocab("llama", **changes)


def with_tokens(*extra: bytes | str, types: Sequence[int] = ()) -> bytes:
    """Return a gpt2 vocabulary of twelve letters and these tokens."""
    texts = [*"abcdefghijkl", *extra]
    kinds = [1] * (len(texts) - len(types)) + list(types)
    tokens = strings(GGML + "tokens", texts)
    return vocab(tokens=tokens, token_type=ints(GGML + "token_type", kinds))


def u32(name: str, value: int) -> bytes:
    """Return a tokenizer key that holds a UINT32."""
    return pair(GGML + name, U32, struct.pack("<I", value))


def a_string(name: str, value: str) -> bytes:
    """Return a key that holds a string."""
    return pair(name, STRING, text(value))


def model_cases() -> Iterator[Hostile]:
    """Yield vocabularies of kinds that are not run; half of them abort llama.cpp."""
    unsupported = "UnsupportedModelError"
    for model in ("bert", "t5", "rwkv", "no_vocab", "none", "plamo2", "", "x" * 5000):
        data = vocab(model=a_string(GGML + "model", model))
        yield vocab_case(f"model-{model[:9]}", "this version runs", data, unsupported)
    yield vocab_case("model-missing", "'tokenizer.ggml.model' is missing", vocab(model=None))
    yield vocab_case("model-u32", "is UINT32, but STRING", vocab(model=u32("model", 1)))
    for pre in ("gemma4", "sarvam-moe", "whitespace"):
        data = vocab(pre=a_string(GGML + "pre", pre))
        yield vocab_case(f"pre-{pre}", "not byte-level", data, unsupported)
    parts = pair("split.count", U16, struct.pack("<H", 3))
    yield vocab_case("split", "one of 3 parts", vocab(split=parts), unsupported)


def token_cases() -> Iterator[Hostile]:
    """Yield vocabularies whose token texts would abort, mislead or exhaust llama.cpp."""
    yield vocab_case("tokens-missing", "tokens' is missing", vocab(tokens=None))
    yield vocab_case("tokens-none", "it has 0 tokens", vocab(tokens=strings(GGML + "tokens", [])))
    yield vocab_case("tokens-ints", "ARRAY of INT32, but", vocab(tokens=ints(GGML + "tokens", [1])))
    yield vocab_case("tokens-string", "STRING, but", vocab(tokens=a_string(GGML + "tokens", "a")))
    yield vocab_case("duplicate-tokens-assert", "tokens 0 and 12 are both", with_tokens("a"))
    yield vocab_case("duplicate-behind-zero-byte", "zero byte", with_tokens(b"a\0z"))
    taken = with_tokens("", "[EMPTY_12]")
    yield vocab_case("duplicate-of-renamed-empty", "'[EMPTY_12]'", taken)
    yield vocab_case("token-not-utf8", "not UTF-8", with_tokens(b"\xc3\x28"))
    halves = with_tokens(b"\xc3", b"\xa9")
    yield vocab_case("token-utf8-split-over-two", "not UTF-8", halves)
    yield vocab_case(
        "CVE-2025-49847-token-70000-bytes", "has 70000 bytes", with_tokens("y" * 70000)
    )
    bomb = with_tokens("\u4e00" * 20000)
    yield vocab_case("token-decodes-to-1-GB", "would take", bomb)
    byte_names = {
        "L25969-byte-token-minus-1": "<0x-1>",
        "byte-token-short": "<",
        "byte-token-no-hex": "<0xGG>",
        "byte-token-long": "<0x000>",
        "byte-token-space": "<0x 1>",
    }
    for name, token in byte_names.items():
        yield vocab_case(name, "byte token 12", with_tokens(token, types=[6]))
        spm_tokens = strings(GGML + "tokens", ["<s>", "</s>", "<unk>", token, *BYTES[1:]])
        yield vocab_case(f"{name}-spm", "byte token 3", spm(tokens=spm_tokens))
    lacks = strings(GGML + "tokens", ["<s>", "</s>", "<unk>", *BYTES[:255], "x"])
    types = ints(GGML + "token_type", [3, 3, 2] + [6] * 255 + [1])
    yield vocab_case("byte-token-missing", "the byte 0xFF", spm(tokens=lacks, token_type=types))


def type_and_id_cases() -> Iterator[Hostile]:
    """Yield vocabularies whose token types or special ids are wrong."""
    for n in (11, 29, 31, 0):
        few = vocab(token_type=ints(GGML + "token_type", [1] * n))
        yield vocab_case(f"types-{n}-for-30", f"{n} elements for 30 tokens", few)
    wide = array(GGML + "token_type", I64, 30, b"\0" * 240)
    yield vocab_case("types-64-bit", "ARRAY of INT64", vocab(token_type=wide))
    for value in (-1, 7, 2**31 - 1):
        data = vocab(token_type=ints(GGML + "token_type", [1] * 29 + [value]))
        yield vocab_case(f"type-{value}", f"token 29 has type {value}", data)
    many = [f"t{index}" for index in range(65537)]
    yield vocab_case(
        "special-tokens-65537", "special tokens", with_tokens(*many, types=[3] * 65537)
    )
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        for value in (30, 2**31, 2**32 - 1):
            change = {name: u32(f"{name}_token_id", value), f"{name}_token_id": None}
            yield vocab_case(f"{name}-id-{value}", f"is {value}; it must be", vocab(**change))
    wrong = pair(GGML + "eos_token_id", I32, struct.pack("<i", -1))
    yield vocab_case("eos-id-i32", "is INT32, but UINT32", vocab(eos_token_id=wrong))
    yield vocab_case(
        "padding-id-bool", "BOOL", vocab(p=pair(GGML + "padding_token_id", BOOL, b"\1"))
    )
    few = {"tokens": strings(GGML + "tokens", ["a", "b"]), "token_type": None}
    yield vocab_case("bos-default-beyond", "its default 11", vocab(bos_token_id=None, **few))
    add_eos = pair(GGML + "add_eos_token", BOOL, b"\1")
    data = vocab(eos_token_id=None, add=add_eos, **few)
    yield vocab_case("eos-default-beyond", "its default 11", data)
    yield vocab_case("add-bos-u32", "BOOL is wanted", vocab(add=u32("add_bos_token", 1)))
    suppress = array(GGML + "suppress_tokens", STRING, 1, text("a"))
    yield vocab_case("suppress-strings", "ARRAY of INT32", vocab(suppress=suppress))


def score_and_merge_cases() -> Iterator[Hostile]:
    """Yield vocabularies whose scores, merges or name are wrong."""
    short = array(GGML + "scores", F32, 3, b"\0" * 12)
    yield vocab_case("scores-3-for-259", "3 elements for 259", spm(scores=short))
    nan = array(GGML + "scores", F32, 259, struct.pack("<259f", *[math.nan] * 259))
    yield vocab_case("scores-nan", "NaN", spm(scores=nan))
    named = strings(GGML + "scores", ["a"] * 259)
    yield vocab_case("scores-strings", "ARRAY of STRING", spm(scores=named))
    yield vocab_case("merges-missing", "merges' is missing", vocab(merges=None))
    yield vocab_case("merges-ints", "ARRAY of INT32", vocab(merges=ints(GGML + "merges", [1])))
    for name, merge in {"no-space": "ab", "two-spaces": "a b c", "empty": ""}.items():
        data = vocab(merges=strings(GGML + "merges", ["a b", merge]))
        yield vocab_case(f"merge-{name}", "2 merges but", data)
    for name, merge in {"leading": " ab", "trailing": "ab "}.items():
        data = vocab(merges=strings(GGML + "merges", ["a b", merge]))
        yield vocab_case(f"merge-{name}-space", "merge 1 is", data)
    named = a_string("general.name", "my Phi-3 tune")
    yield vocab_case("phi-3-without-its-tokens", "lacks the token", vocab(name=named))


TABLES = (
    *(frame_cases, value_cases, alignment_cases, extent_cases, layout_cases),
    *(model_cases, token_cases, type_and_id_cases, score_and_merge_cases),
)


def all_cases() -> list[Hostile]:
    """Return every malformed file."""
    return [hostile for table in TABLES for hostile in table()]
