import json
import time
from typing import Any

import pytest

from llava_edge.profiles.cli import main
from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.sizes import format_bytes

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *argv: str) -> tuple[int, dict[str, Any], str]:
    code = main([*argv, "--json"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0]), captured.err


def test_the_last_line_is_one_json_object_and_the_table_goes_to_stderr(capsys: Captured) -> None:
    code, plan, table = run(capsys, "--profile", "a100")
    assert code == 0
    assert (plan["profile"], plan["variant"], plan["fits"]) == ("a100", "llava-next-110b", True)
    assert "kv_cache" in table
    assert "predicted, not measured" in table


def test_without_json_the_table_is_the_output(capsys: Captured) -> None:
    assert main(["--profile", "rtx-4090"]) == 0
    captured = capsys.readouterr()
    assert "llava-v1.6-34b at int4, grid 2x2" in captured.out
    assert "larger, and why not" in captured.out
    assert captured.err == ""


def test_vram_alone_plans_the_cuda_target_without_speeds(capsys: Captured) -> None:
    code, plan, _ = run(capsys, "--vram", "24GiB")
    assert code == 0
    assert plan["memory"]["budget_bytes"] == 24 << 30
    assert plan["predicted"] == {"decode_tokens_per_second": None, "ttft_seconds": None}
    # fp16 activations: a cpu plan would keep the tower at four bytes a weight.
    assert plan["memory"]["vision_tower_bytes"] == 581_818_368


def test_vram_beside_a_profile_replaces_its_memory(capsys: Captured) -> None:
    _, plan, _ = run(capsys, "--profile", "jetson-agx-orin-64gb", "--vram", "12GiB")
    assert plan["memory"]["budget_bytes"] == 12 << 30
    assert plan["predicted"]["ttft_seconds"] > 0


def test_this_machine_is_the_default(capsys: Captured) -> None:
    _, plan, _ = run(capsys, "llava-v1.6-vicuna-7b", "--precision", "int4", "--device", "cpu")
    assert plan["profile"] == "this-machine"


def test_a_pin_that_does_not_fit_ends_with_2_the_shortfall_and_the_nearest(
    capsys: Captured,
) -> None:
    code, plan, table = run(
        capsys, "llava-v1.6-34b", "--profile", "a10", "--precision", "fp16", "--grid", "2x2"
    )
    short = plan["memory"]["total_bytes"] - plan["memory"]["budget_bytes"]
    assert (code, plan["fits"]) == (2, False)
    assert f"short of {format_bytes(short)}." in table
    assert str(short) not in table
    assert "Nearest that fits: llava-v1.6-34b at int4, grid 2x2" in table


def test_nothing_at_all_may_fit(capsys: Captured) -> None:
    code, plan, table = run(capsys, "--vram", "1GiB")
    assert (code, plan["fits"], len(plan["rejected"])) == (2, False, 63)
    assert "Nothing smaller fits either" in table


def test_all_adds_the_pareto_set(capsys: Captured) -> None:
    _, plan, table = run(capsys, "--profile", "t4", "--all")
    assert {p["variant"] for p in plan["pareto"]} >= {plan["variant"]}
    assert "not beaten by any other" in table


def test_larger_grids_say_that_the_weights_were_not_trained_on_them(capsys: Captured) -> None:
    _, plan, table = run(capsys, "llava-v1.6-mistral-7b", "--profile", "a100", "--grid", "2x6")
    assert plan["max_image_tokens"] == 7632
    assert "was not trained on" in table


def test_a_video_is_planned_with_video_variants(capsys: Captured) -> None:
    _, eight, _ = run(capsys, "--profile", "a100", "--video")
    _, many, _ = run(capsys, "--profile", "a100", "--video", "32")
    assert eight["variant"] == "LLaVA-NeXT-Video-34B"
    assert many["variant"] == "LLaVA-NeXT-Video-7B"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--profile", "a100", "--detect"], "both given"),
        (["--profile", "a100", "--device", "cpu"], "cuda target"),
        (["--profile", "nope"], "nope"),
        (["--vram", "24 apples"], "24 apples"),
        (["llava-99b", "--profile", "a100"], "llava-99b"),
        (["--profile", "h100", "--engine", "tensorrt-rtx"], "9.0"),
    ],
)
def test_malformed_requests_are_named(argv: list[str], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        main(argv)
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_answer_takes_well_under_a_second(capsys: Captured) -> None:
    start = time.process_time()
    run(capsys, "--profile", "dgx-spark")
    assert time.process_time() - start < 0.8
