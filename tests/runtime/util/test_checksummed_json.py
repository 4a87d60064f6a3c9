"""Sealed documents notice any change; the strict parser takes what all readers read alike."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_edge.profiles.errors import ArtifactError, ExportError
from llava_edge.runtime.util.checksummed_json import check_seal, parse_strict, seal


def test_the_seal_is_the_digest_of_the_bytes_with_an_empty_seal() -> None:
    data = seal({"b": 1, "a": "é"})
    digest = json.loads(data)["self_sha256"]
    blank = b'{\n  "a": "\\u00e9",\n  "b": 1,\n  "self_sha256": ""\n}\n'
    assert digest == hashlib.sha256(blank).hexdigest()
    assert data == blank.replace(b'""', f'"{digest}"'.encode())


def test_a_seal_holds_for_any_spacing_and_key_order() -> None:
    blank = b'{"self_sha256"\t: "",   "z":[1,\n2]}'
    digest = hashlib.sha256(blank).hexdigest()
    data = blank.replace(b'""', f'"{digest}"'.encode())
    check_seal(data, parse_strict(data, "x"), "x")


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text() | st.integers(-(10**18), 10**18)), st.data())
def test_what_is_sealed_reads_back_and_any_changed_byte_is_noticed(
    document: dict[str, object], data: st.DataObject
) -> None:
    document.pop("self_sha256", None)
    sealed = seal(document)
    read = parse_strict(sealed, "x")
    check_seal(sealed, read, "x")
    assert {key: value for key, value in read.items() if key != "self_sha256"} == document
    changed = bytearray(sealed)
    changed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactError):
        check_seal(bytes(changed), parse_strict(bytes(changed), "x"), "x")


def test_text_that_looks_like_a_seal_is_no_seal() -> None:
    data = seal({"note": '"self_sha256": "' + "0" * 64 + '"'})
    check_seal(data, parse_strict(data, "x"), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b'{"self_sha256": ""}',
        b'{"self_sha256": 1}',
        b'{"a": {"self_sha256": "' + b"0" * 64 + b'"}}',
        b'{"self\\u005fsha256": "' + b"0" * 64 + b'"}',
    ],
)
def test_a_document_without_a_seal_of_its_own_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="exactly one digest"):
        check_seal(data, parse_strict(data, "x"), "x")


def test_a_second_seal_inside_is_refused_even_if_the_first_is_right() -> None:
    inner = b'{"a": {"self_sha256": "' + b"0" * 64 + b'"}, '
    blank = inner + b'"self_sha256": ""}'
    digest = hashlib.sha256(blank).hexdigest().encode()
    data = inner + b'"self_sha256": "' + digest + b'"}'
    swapped = b'{"self_sha256": "' + digest + b'", ' + inner[1:-2] + b"}"
    for text in (data, swapped):
        with pytest.raises(ArtifactError, match="exactly one digest"):
            check_seal(text, parse_strict(text, "x"), "x")


@pytest.mark.parametrize(
    "document",
    [{"a": float("nan")}, {"a": object()}, {"a": {"self_sha256": ""}}],
    ids=["not a number", "no JSON value", "a seal inside"],
)
def test_what_cannot_be_sealed_is_an_export_error(document: dict[str, object]) -> None:
    with pytest.raises(ExportError):
        seal(document)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', "stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "stands twice"),
        (b'{"a": NaN}', "no JSON number"),
        (b'{"a": -Infinity}', "no JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b"1" * 21, "21 digits"),
        (b"1" * 100_000, "100000 digits"),
        (b'"\\ud800"', "surrogates"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b"\xff\xfe{\x00}\x00", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"{} {}", "Extra data"),
        (b"", "Expecting value"),
        (b"{'a': 1}", "Expecting property name"),
    ],
)
def test_what_readers_would_not_read_alike_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        parse_strict(data, "file.json")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parse_strict(data, "x")
    except ArtifactError:
        return
