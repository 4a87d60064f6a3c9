"""The trained-model machinery on a tiny spec: packing, checkpoint, training, resuming."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llava_edge.bench.lab.pages.ablation import FAULTS
from llava_edge.bench.lab.pages.drawing.sample import held_out_sample, training_sample
from llava_edge.bench.lab.pages.evaluate import Evaluator
from llava_edge.bench.lab.pages.training.batch import IGNORED, collate, encode_sample
from llava_edge.bench.lab.pages.training.checkpoint import read_weights, write_checkpoint
from llava_edge.bench.lab.pages.training.model import PageModel, to_tensors
from llava_edge.bench.lab.pages.training.spec import Spec
from llava_edge.bench.lab.pages.training.tokenizer import train_tokenizer
from llava_edge.bench.lab.pages.training.train import Settings, Trainer, batches_from
from llava_edge.convert.checkpoint.open import open_checkpoint
from llava_edge.profiles.errors import OutputExistsError

TINY = Spec(
    vision_hidden_size=32,
    vision_intermediate_size=32,
    vision_layers=2,
    vision_heads=2,
    hidden_size=32,
    intermediate_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
)
SETTINGS = Settings(spec=TINY, pages=4, micro=2, questions=3, tower_steps=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """At this size a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "checkpoint"
    model = PageModel(TINY, train_tokenizer(), seed=5)
    write_checkpoint(folder, TINY, model.llava.state_dict())
    return folder


def test_what_is_read_or_copied_is_one_token_a_character() -> None:
    tokenizer = train_tokenizer()
    for text in ("FOX", "331", "K7/=Q+-A"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(text)
    for text in ("What is the number on line 3?", "Ü 漢字 🙂", "purple"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.to_str() == train_tokenizer().to_str()


def test_transformers_loads_the_checkpoint_unchanged_and_so_do_we(checkpoint: Path) -> None:
    loader: Any = transformers.LlavaNextForConditionalGeneration
    _, report = loader.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    opened = open_checkpoint(str(checkpoint))
    assert opened.dims.vision.image_size == 84
    with pytest.raises(OutputExistsError):
        write_checkpoint(checkpoint, TINY, {})


def test_a_packed_batch_gives_the_logits_of_each_question_alone(checkpoint: Path) -> None:
    tokenizer = train_tokenizer()
    model = PageModel(TINY, tokenizer, seed=5)
    model.llava.half().float()
    processor: Any = transformers.LlavaNextProcessor.from_pretrained(checkpoint)
    loader: Any = transformers.LlavaNextForConditionalGeneration
    reference = loader.from_pretrained(checkpoint, dtype=torch.float32).eval()
    samples = [training_sample(index, 3) for index in (2, 3)]
    batch = to_tensors(collate([encode_sample(sample, tokenizer) for sample in samples]), CPU)
    found = model(batch)
    losses = []
    for sample in samples:
        for question in sample.questions:
            asked = f"[INST]<image>\n{question.text}[/INST]"
            inputs = processor(
                images=[sample.image], text=[asked + question.answer + "</s>"], return_tensors="pt"
            )
            answer = tokenizer.encode(question.answer + "</s>", add_special_tokens=False).ids
            with torch.no_grad():
                logits = reference(**inputs).logits[0, -len(answer) - 1 : -1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
            losses.append((each, min(1.0, 5.0 / len(answer))))
    total = sum(float(each.sum()) * weight for each, weight in losses)
    weights = sum(len(each) * weight for each, weight in losses)
    assert float(found.answer) == pytest.approx(total / weights, rel=1e-4)


def test_labels_stand_where_the_cells_of_the_page_are() -> None:
    sample = training_sample(2, 3)
    encoded = encode_sample(sample, train_tokenizer())
    labelled = encoded.signs != IGNORED
    assert labelled.sum() == sample.page.rows * sample.page.columns
    assert (encoded.source[labelled] >= 36).all()
    assert (encoded.signs > 0).sum() == len(sample.page.marks)


def test_the_loss_falls_in_a_few_steps(tmp_path: Path) -> None:
    settings = replace(SETTINGS, tower_steps=0)
    trainer = Trainer(settings, tmp_path / "state.safetensors", CPU, half=False)
    batches = next(batches_from(settings, trainer.tokenizer, 0))
    losses = [float(trainer.train_step(batches, 10_000).answer) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_gives_the_weights_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def steps(trainer: Trainer, count: int) -> None:
        batches = batches_from(SETTINGS, trainer.tokenizer, trainer.step)
        for _ in range(count):
            trainer.train_step(next(batches), 12)

    whole = Trainer(SETTINGS, tmp_path / "whole.safetensors", CPU, half=False)
    steps(whole, 6)
    state = tmp_path / "state.safetensors"
    first = Trainer(SETTINGS, state, CPU, half=False)
    # In the middle of a pool of batches, as an interruption mostly is.
    steps(first, 5)
    first.save()
    second = Trainer(SETTINGS, state, CPU, half=False)
    assert second.step == 5
    steps(second, 1)
    second.save()
    expected = {name: value.numpy() for name, value in whole.model.llava.state_dict().items()}
    found = read_weights(state)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)
    with pytest.raises(ValueError, match="another --out"):
        Trainer(replace(SETTINGS, seed=1), state, CPU)


def test_every_fault_still_runs_and_changes_nothing_afterwards(checkpoint: Path) -> None:
    evaluator = Evaluator(checkpoint)
    samples = [held_out_sample(0, index) for index in range(3)]
    before = evaluator.answers(samples)
    for fault in FAULTS:
        evaluator.answers(samples, fault)
    evaluator.answers(samples, base=True)
    assert evaluator.answers(samples) == before
