"""Chat templates are rendered in a child process with bounds, by the rules of transformers."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from llava_edge.convert.text import template_sandbox
from llava_edge.convert.text.template_sandbox import (
    ChatRequest,
    Environment,
    LimitError,
    ProcessLimits,
    Rendering,
    TemplateLimits,
    render_all,
    run_bounded,
)
from llava_edge.profiles.errors import CheckpointError
from tests.support.tiers import slow_but

ENVIRONMENTS: tuple[Environment, ...] = ("own", "transformers")
QUICK = TemplateLimits(seconds=1)
HELLO = ({"role": "user", "content": "hello"},)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NOW = datetime(2026, 11, 30, 12, 5, tzinfo=UTC).timestamp()


def render(template: str, environment: Environment = "own", **options: Any) -> Rendering:
    request = ChatRequest(HELLO, clock=NOW)
    return render_all(
        template, {"bos_token": "<s>"}, [request], environment=environment, **options
    )[0]


BOMBS = (
    pytest.param(LOOP, "within 1 seconds of processor time", id="loops"),
    pytest.param(
        "{% if strftime_now('%Y') == '2026' %}" + LOOP + "{% endif %}",
        "within 1 seconds of processor time",
        id="loops in one year",
    ),
    pytest.param("{{ 'a' * 9000000000 }}", "768 MiB of memory", id="a long repetition"),
    pytest.param("{{ 'a' | center(10**9) }}", "768 MiB of memory", id="a wide field"),
    pytest.param("{{ '%999999999d' % 1 }}", "768 MiB of memory", id="a format"),
    pytest.param("{{ '{:>999999999}'.format(1) }}", "768 MiB of memory", id="a new format"),
    pytest.param(
        "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}", "768 MiB of memory", id="replaces"
    ),
    pytest.param(
        "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "longer than 200000 characters",
        id="swells",
    ),
)


@pytest.mark.parametrize(("template", "limit"), BOMBS)
def test_a_template_that_leaves_its_bounds_is_refused_and_the_limit_named(
    template: str, limit: str
) -> None:
    refused(template, limit, "own")


def refused(template: str, limit: str, environment: Environment) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=limit):
        render(template, environment, limits=QUICK)
    # The bound is processor time; a busy machine takes longer.
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("template", "limit"), slow_but([BOMBS[1], BOMBS[2]], [BOMBS[1], BOMBS[2], BOMBS[-1]])
)
def test_the_rules_of_transformers_are_bounded_alike(template: str, limit: str) -> None:
    refused(template, limit, "transformers")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ namespace(_x=1) }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_a_template_raises_is_its_answer(template: str, error: str) -> None:
    answer = render(template)
    assert answer.text is None
    assert error in str(answer.error)


def test_both_environments_have_the_rules_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    template = """\
    {% set ns = namespace(n=0) %}
    {%- for m in messages %}
        {% if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}{{ m.content | trim }}{% endgeneration %}
    {{ m | tojson }} {{ {'é': '<&>'} | tojson(indent=1) }}{{ dict(a=1).a }}
    {% endfor %}
    {{ tools is none }} {{ documents is defined }} {{ bos_token }} {{ missing }}|
    {{ strftime_now('%d %b %Y %H:%M') }} {{ add_generation_prompt }}
    """

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromtimestamp(NOW, UTC)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    (theirs,), _ = chat_template_utils.render_jinja_template(  # type: ignore[str-unpack]
        conversations=[list(HELLO)],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert "30 Nov 2026 12:05" in theirs
    for environment in ENVIRONMENTS:
        assert render(template, environment).text == theirs


def test_without_a_clock_a_date_is_a_mark_of_its_form() -> None:
    (answer,) = render_all("{{ strftime_now('%d %b') }}", {}, [ChatRequest(HELLO, clock=None)])
    assert answer.text == "<date:%d %b>"


def write_script(folder: Path, body: str) -> Path:
    script = folder / "child.py"
    script.write_text(
        "import json, os, sys, time\n"
        "from llava_edge.convert.text.template_sandbox import limit_process\n"
        "limits = json.load(sys.stdin)\nlimit_process(limits)\n" + body,
        "utf-8",
    )
    return script


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("time.sleep(60)", "did not end within 1 seconds$"),
        ("while True: pass", "within 1 seconds of processor time"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("sys.exit(3)", "status 3"),
    ],
)
def test_a_bounded_process_says_which_limit_it_reached(
    tmp_path: Path, body: str, words: str
) -> None:
    limits = ProcessLimits(seconds=1, wall_seconds=1.0 if "sleep" in body else 60.0)
    request = json.dumps({**vars(limits)}).encode()
    with pytest.raises(LimitError, match=words):
        run_bounded(write_script(tmp_path, body), request, limits)


def test_waiting_for_a_busy_machine_ends_nothing(tmp_path: Path) -> None:
    limits = ProcessLimits(seconds=1)
    script = write_script(tmp_path, "time.sleep(3)\nsys.stdout.write('done')")
    assert run_bounded(script, json.dumps(vars(limits)).encode(), limits) == b"done"


def test_no_other_module_renders_a_template() -> None:
    root = Path(template_sandbox.__file__).parents[2]
    own = Path(template_sandbox.__file__).name
    ways = re.compile(
        r"\.apply_chat_template\([^t]|render_jinja_template|^\s*(from|import) jinja2", re.M
    )
    found = [
        str(path)
        for package in ("bench", "convert", "profiles", "runtime")
        for path in (root / package).rglob("*.py")
        if path.name != own and ways.search(path.read_text("utf-8"))
    ]
    assert found == []


def test_the_child_finds_packages_where_the_user_said_and_not_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"only_{name}.py").touch()
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util as find, sys\n"
        "print([n for n in ('only_there', 'only_here') if find.find_spec(n)])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path / 'there'}")
    monkeypatch.chdir(tmp_path / "here")

    assert run_bounded(script, b"", ProcessLimits()) == b"['only_there']\n"
