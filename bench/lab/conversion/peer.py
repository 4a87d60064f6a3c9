"""GPTQModel and our solver on the same text-only model, ids and settings.

One Llama of 4 layers stands alone for GPTQModel and as the language model of a LLaVA-NeXT
checkpoint for ``llava-edge convert``, which then calibrates with prompts without images. Both run
in fresh processes with the same number of threads, in turn. A third program, of neither, compares
what they wrote with the model of full precision (``peer_judge.py``).

Our time and memory are those of the whole conversion: vision graph, decoder graph, hashing and both
forms of the weights included. Theirs are those of loading, quantising and saving.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.common.subprocess_runner import Spent, run_fresh
from llava_edge.bench.lab.conversion.memory import convert, read_journal, write_checkpoint
from llava_edge.bench.lab.conversion.peer_prompts import (
    PeerPrompt,
    calibration_digest,
    draw_prompts,
    write_conversations,
    write_word_tokenizer,
)
from llava_edge.runtime.util.progress import Notify

SIZES: Mapping[str, int | float | str] = {
    "backbone": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "layers": 4,
    "heads": 16,
    "kv_heads": 8,
    "vocab_size": 8192,
}
PROMPTS, PROMPT_TOKENS = 16, 512
ROUNDS = 2
_DAMP = 0.01
"""Ours; GPTQModel's own default is 0.05."""
SETTINGS = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damp_percent": _DAMP}
OURS, THEIRS = "llava-edge", "gptqmodel"
EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "gptqmodel, default damping": {"damp_percent": 0.05},
    "gptqmodel, scale search": {"mse": 2.0},
}
"""Run once, for the error alone: what its users may choose instead."""


def measure_peer(
    work: Path,
    interpreter: Path,
    threads: int,
    report: Notify,
    sizes: Mapping[str, int | float | str] = SIZES,
    prompts: tuple[int, int] = (PROMPTS, PROMPT_TOKENS),
) -> dict[str, Any]:
    """Run both in turn and judge them.

    Args:
        work: folder of this step; finished runs in it are not repeated.
        interpreter: Python of the peer's environment.
        threads: of each.
        report: told what is going on.
        sizes: of the random checkpoint.
        prompts: how many, and tokens of each.

    Raises:
        subprocess.CalledProcessError: a command failed.
        RuntimeError: the conversion saw other ids than the peer.
    """
    work = work.absolute()
    bench = _Peer(work, interpreter, threads, report)
    bench.prepare(sizes, prompts)
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for turn in range(ROUNDS):
        runs[OURS].append(bench.once(f"ours-{turn}", bench.ours, "gptq"))
        runs[THEIRS].append(bench.once(f"theirs-{turn}", bench.theirs, SETTINGS))
    folders = {OURS: work / "ours-0" / "gptq", THEIRS: work / "theirs-0"}
    bench.once("rounded", bench.ours, "rtn")
    folders["rounded to nearest"] = work / "rounded" / "gptq"
    for place, (name, changes) in enumerate(EXTRAS.items()):
        bench.once(f"extra-{place}", bench.theirs, {**SETTINGS, **changes})
        folders[name] = work / f"extra-{place}"
    result = {
        "sizes": dict(sizes),
        "settings": SETTINGS,
        "prompts": list(prompts),
        "threads": threads,
        "runs": runs,
        "judged": summary(bench.judge(folders)),
    }
    result["holds"] = holds(result)
    shutil.rmtree(work)
    return result


def holds(result: Mapping[str, Any]) -> bool:
    """No larger mean error on the calibration tokens, in less time and less memory."""
    judged = result["judged"]["calibration"]
    ours, theirs = (result["runs"][name] for name in (OURS, THEIRS))
    return (
        judged[OURS]["linears"] <= judged[THEIRS]["linears"]
        and middle(ours, "seconds") < middle(theirs, "seconds")
        and middle(ours, "peak_bytes") < middle(theirs, "peak_bytes")
    )


def middle(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    """Median over runs."""
    return float(statistics.median(run[key] for run in runs))


def summary(judged: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means over linear layers, and the worst layer, of what the judge found."""
    return {
        tokens: {
            name: {
                "linears": statistics.fmean(found["linears"].values()),
                "largest_linear": max(found["linears"].values()),
                "by_linear": _by_kind(found["linears"]),
                "layers": found["layers"],
                "changes": found["changes"],
                "logits": found["logits"],
            }
            for name, found in candidates.items()
        }
        for tokens, candidates in judged.items()
    }


def _by_kind(linears: Mapping[str, float]) -> dict[str, float]:
    """Mean over layers of each linear layer."""
    kinds: dict[str, list[float]] = {}
    for name, error in linears.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(error)
    return {kind: statistics.fmean(errors) for kind, errors in kinds.items()}


class _Peer:
    """The folder of one comparison."""

    def __init__(self, work: Path, interpreter: Path, threads: int, report: Notify) -> None:
        self._work = work.absolute()
        # Not resolved: the link is what makes it the Python of that environment.
        self._interpreter = str(interpreter.absolute())
        self._environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._report = report
        self._calibration: tuple[PeerPrompt, ...] = ()

    def prepare(self, sizes: Mapping[str, int | float | str], prompts: tuple[int, int]) -> None:
        """Write the model twice, and the prompts twice."""
        work = self._work
        source, tokenizer = work / "source", work / "source" / "tokenizer.json"
        if not (work / "prepared").exists():
            for name in ("source", "llava", "llama", "questions"):
                shutil.rmtree(work / name, ignore_errors=True)
            write_checkpoint(source, sizes, self._report)
            write_word_tokenizer(tokenizer, int(sizes["vocab_size"]))
            self._script("peer_model", source, work / "llava", work / "llama", 0)
            (work / "prepared").touch()
        self._calibration = draw_prompts(tokenizer, *prompts, seed=0)
        held_out = draw_prompts(tokenizer, *prompts, seed=1)
        write_conversations(work / "questions", self._calibration)
        ids = {
            "calibration": [prompt.ids for prompt in self._calibration],
            "held out": [prompt.ids for prompt in held_out],
        }
        (work / "judged.json").write_text(json.dumps(ids), "utf-8")
        (work / "tokens.json").write_text(json.dumps(ids["calibration"]), "utf-8")

    def once(self, name: str, run: Any, argument: Any) -> dict[str, Any]:
        """What a run took, from its file where an earlier call has measured it."""
        kept = self._work / f"{name}.json"
        if not kept.exists():
            self._report(f"peer: {name}")
            shutil.rmtree(self._work / name, ignore_errors=True)
            shutil.rmtree(self._work / f"{name}.partial", ignore_errors=True)
            spent: Spent = run(self._work / name, argument)
            took = {
                "seconds": spent.seconds,
                "cpu_seconds": spent.cpu_seconds,
                "peak_bytes": spent.peak_bytes,
                "load": spent.load,
            }
            kept.write_text(json.dumps(took), "utf-8")
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        self._report(f"peer: {name} {found['seconds']:.1f} s, {found['peak_bytes'] >> 20} MiB")
        return found

    def ours(self, out: Path, quantizer: str) -> Spent:
        """One conversion."""
        digests: set[str] = set()

        def look(_: float) -> None:
            journal = read_journal(out.with_name(f"{out.name}.partial") / "work" / "journal.json")
            if journal:
                digests.add(journal["key"]["samples"])

        options = ["--precision", "int4", "--quantizer", quantizer, "--emit", "onnx,hf"]
        options += ["--no-template", "--calibration", str(self._work / "questions")]
        spent = convert(self._work / "llava", out, options, self._environment, look)
        if quantizer == "gptq" and digests != {calibration_digest(self._calibration)}:
            raise RuntimeError("the conversion calibrated with other ids than the peer gets")
        return spent

    def theirs(self, out: Path, settings: Mapping[str, Any]) -> Spent:
        """One run of GPTQModel, in float32 as ours computes."""
        options = json.dumps({"dtype": "float32", **settings})
        arguments = [self._work / "llama", self._work / "tokens.json", out, options]
        command = [self._interpreter, _script("peer_quantize"), *map(str, arguments)]
        # In its own folder, since it writes logs to where it runs.
        return run_fresh(command, self._environment, folder=self._work)

    def judge(self, folders: Mapping[str, Path]) -> dict[str, Any]:
        """The judge's findings."""
        self._report("peer: judging")
        candidates = [f"{name}={folder}" for name, folder in folders.items()]
        printed = self._script(
            "peer_judge", self._work / "llama", self._work / "judged.json", *candidates
        )
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def _script(self, name: str, *arguments: object) -> str:
        command = [self._interpreter, _script(name), *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _script(name: str) -> str:
    return str(Path(__file__).with_name(f"{name}.py"))
