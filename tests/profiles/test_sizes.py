import pytest

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.sizes import format_above, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("1.5GiB", 3 << 29),
        ("8GB", 8_000_000_000),
        ("512MiB", 512 << 20),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "8589934592",
        "nan",
        "inf",
        "GiB",
        "-1GiB",
        "0",
        "1e9",
        "24 Gigs",
        "0.1",
        "９GiB",
        "9" * 99,
    ],
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match="not a memory size"):
        parse_bytes(text)


def test_sizes_are_written_with_a_binary_unit() -> None:
    assert [format_bytes(n) for n in (5, 1536, 3 << 29)] == ["5 B", "1.5 KiB", "1.5 GiB"]


def test_a_size_just_above_a_limit_is_not_shown_as_the_limit() -> None:
    assert format_above(5 << 20, 1 << 20) == "5.0 MiB"
    assert format_above((1 << 20) + 1, 1 << 20) == "more than 1.0 MiB"
