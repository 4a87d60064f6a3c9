from pathlib import Path

import pytest

from llava_edge.profiles.boards.engines import RTX_CAPABILITIES
from llava_edge.profiles.boards.hardware import load_profile, parse_profile, profile_names
from llava_edge.profiles.errors import ProfileError

BOARDS = (
    *("a100", "a100-40gb", "h100", "h200", "l4", "l40s", "a10", "t4"),
    *("rtx-3060-12gb", "rtx-4060-8gb", "rtx-4070-12gb", "rtx-4090", "rtx-5090"),
    *("jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-32gb"),
    *("jetson-agx-orin-64gb", "jetson-thor", "dgx-spark"),
    *("4xa100", "8xh100", "cpu-16gb", "cpu-32gb"),
)

GOOD = 'kind = "cuda"\nmemory = "8 GiB"\n'


def test_all_boards_ship() -> None:
    assert sorted(BOARDS) == list(profile_names())


@pytest.mark.parametrize("name", BOARDS)
def test_every_number_of_a_board_names_its_source(name: str) -> None:
    profile = load_profile(name)
    numbers = {"memory", "system_reserve", "bandwidth", "peak_fp16", "peak_int8", "prefill_chunk"}
    if profile.kind != "cpu":
        numbers.add("compute_capability")
    assert numbers <= set(profile.sources)
    assert all(len(source) > 5 for source in profile.sources.values())
    assert profile.name == name
    assert 0 < profile.budget_bytes < profile.memory_bytes


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_has_an_rtx_target_only_within_the_support_matrix(name: str) -> None:
    profile = load_profile(name)
    assert (profile.rtx_target is not None) == (profile.compute_capability in RTX_CAPABILITIES)


def test_rtx_targets_of_known_boards() -> None:
    found = {name: load_profile(name).rtx_target for name in ("t4", "a100", "dgx-spark", "h100")}
    assert found == {"t4": "SM75", "a100": None, "dgx-spark": "SM121", "h100": None}


@pytest.mark.parametrize("name", ["jetson-orin-nano-8gb", "jetson-thor", "dgx-spark"])
def test_boards_without_wheels_on_pypi_say_where_theirs_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.unified
    assert profile.target == "cuda"
    assert "PyPI has no onnxruntime-gpu wheel for aarch64" in profile.wheels


def test_a_cpu_board_names_its_int8_instructions() -> None:
    assert load_profile("cpu-16gb").int8_isa == "vnni"
    assert load_profile("cpu-16gb").target == "cpu"


def test_a_file_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD + 'system_reserve = 5\nhost_memory = "4 GiB"\nhost_reserve = "1 GiB"\n')
    profile = load_profile(path)
    assert profile.name == "my-board"
    assert profile.budget_bytes == (8 << 30) - 5
    assert profile.host_budget_bytes == 3 << 30
    assert profile.bandwidth is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ProfileError, match=r"no profile 'a1000'.*a100.*--vram"):
        load_profile("a1000")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"gone\.toml is not a file"):
        load_profile(tmp_path / "gone.toml")


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match=r"x\.toml cannot be read"):
        load_profile(path)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("colour = 1", "unknown keys 'colour'"),
        ("memory_bytes = 3", "unknown keys 'memory_bytes'"),
        ("bandwidth = -1.0", "bandwidth is -1.0"),
        ("bandwidth = nan", "bandwidth is nan"),
        ('peak_fp16 = "fast"', "peak_fp16 is 'fast'"),
        ('system_reserve = "9 GiB"', "leaves nothing"),
        ('system_reserve = "lots"', "system_reserve is 'lots'"),
        ("num_devices = 0", "num_devices is 0"),
        ("prefill_chunk = 1.5", "prefill_chunk is 1.5"),
        ('compute_capability = "8"', "compute_capability is '8'"),
        ('int8_isa = "avx"', "int8_isa is 'avx'"),
        ('providers = ["CudaProvider"]', "providers is"),
        ("providers = [[1]]", "providers is"),
        ('compute_capability = "8.0"\nrtx_target = "SM80"', "rtx_target is 'SM80'"),
        ("sources = 5", "sources must be a table"),
        ('[sources]\nspeed = "x"', "sources names unknown keys speed"),
        ("title = 7", "title is 7"),
    ],
)
def test_unknown_keys_and_impossible_values_are_named(line: str, named: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile(GOOD + line, "mine")
    assert named in str(caught.value)


def test_all_faults_of_a_file_come_together() -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile('kind = "tpu"\nmemory = true\nnum_devices = "two"', "mine")
    assert str(caught.value).count("\n  - ") == 3


def test_a_cpu_has_no_host_beside_it() -> None:
    with pytest.raises(ProfileError, match="one memory"):
        parse_profile('kind = "cpu"\nmemory = "8 GiB"\nhost_memory = "4 GiB"', "mine")


def test_what_is_no_toml_is_refused() -> None:
    with pytest.raises(ProfileError, match="is not TOML"):
        parse_profile("kind: cuda", "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bandwidth = " + "9" * 400, "bandwidth is"),
        ("bandwidth = 5e-324", "a rate is a number per second"),
        ("bandwidth = 1e308", "a rate is a number per second"),
        ("num_devices = 4", "has one memory, so it is 1"),
        ("providers = ['CUDAExecutionProvider']", "do not belong to kind 'cpu'"),
        ("name = '../../evil'", "letters, digits"),
        ('title = "\\u001b[31mred"', "cannot be printed"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_no_board_can_be_is_named(change: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        parse_profile(f"kind = 'cpu'\nmemory = '8 GiB'\n{change}\n", "board")


def test_a_memory_beyond_any_board_is_no_size() -> None:
    with pytest.raises(ProfileError, match="not a size"):
        parse_profile("kind = 'cpu'\nmemory = '999999999999 TiB'\n", "board")
