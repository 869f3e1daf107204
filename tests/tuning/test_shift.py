"""The opinion shift as a term of the loss, against whole forward passes of transformers and a dense computation with autograd."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.data.splits import load_split
from bad_neurons.data.tuning import SycophancyDataModule
from bad_neurons.errors import UserError
from bad_neurons.evaluation.scoring import Request, answer_log_probs
from bad_neurons.models.passes import final_hidden
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.module import NeuronTuner
from bad_neurons.tuning.shift import SCALE, Pairs, log_odds, shift_loss
from helpers import write_records


@pytest.fixture
def batches(tmp_path, tiny_folder):
    """Batches of records with target neutral, two rows of retention text beside each."""

    def make(target: str = "neutral"):
        records = write_records(tmp_path / "records.jsonl")
        data = SycophancyDataModule(tiny_folder(), records, target=target, batch_tokens=500, retention_tokens=12)
        data.setup("fit")
        return list(data.train_dataloader()), data

    return make


def dense_odds(lm, turns, answers):
    """Log-odds of two answers by transformers' own forward, one sequence at a time."""
    sums = []
    for answer in answers:
        ids = tokenize(lm.tokenizer, turns, answer)
        log_p = lm.model(input_ids=torch.tensor([ids.prompt + ids.answer])).logits[0].float().log_softmax(-1)
        sums.append(sum(log_p[len(ids.prompt) - 1 + i, token] for i, token in enumerate(ids.answer)))
    return sums[0] - sums[1]


@pytest.mark.parametrize("target", ["neutral", "mixed"])
def test_log_odds_of_each_record(tiny, batches, target):
    lm = tiny()
    view, (made, data) = view_decoder(lm.model), batches(target)
    expected = sorted(float(dense_odds(lm, r.prompt, r.scored)) for r in load_split(data.records, 0.2, 0.2, 0).train)
    found = [log_odds(view, final_hidden(view, batch.rows, batch.at), batch.pairs) for batch in made]
    assert len(made) > 1
    torch.testing.assert_close(torch.cat(found).sort().values, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_teacher_places_are_those_of_the_neutral_prompt(tiny, batches):
    lm = tiny()
    view, (made, data) = view_decoder(lm.model), batches()
    records = load_split(data.records, 0.2, 0.2, 0).train
    asked = [Request(r.neutral_prompt, answer) for r in records for answer in r.scored]
    scores = torch.tensor(answer_log_probs(view, lm.tokenizer, asked).before)
    found = [log_odds(view, final_hidden(view, *batch.teacher), batch.pairs) for batch in made]
    torch.testing.assert_close(torch.cat(found).sort().values, (scores[::2] - scores[1::2]).sort().values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradient_are_dense_ones(softcap):
    generator = torch.Generator().manual_seed(3)
    weight, tuned = torch.randn(30, 8, generator=generator), torch.randn(7, 8, generator=generator, requires_grad=True)
    pairs = Pairs(torch.tensor([0, 1, 0, 3, 4, 5, 5]), torch.tensor([1, 2, 9, 4, 5, 6, 7]), torch.tensor([0, 0, 0, 1, 1, 1, 1]),
                  torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]), 2)  # fmt: skip
    neutral = torch.tensor([0.7, -4.0])

    class View:
        head = torch.nn.Linear(8, 30, bias=False)

    View.head.weight = torch.nn.Parameter(weight, requires_grad=False)
    View.softcap = softcap
    found = shift_loss(View, tuned, pairs, neutral)
    (gradient,) = torch.autograd.grad(found.loss, tuned)
    z = tuned @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)[pairs.at, pairs.targets] * pairs.sign
    shifts = torch.stack([log_p[:3].sum(), log_p[3:].sum()]) - neutral
    loss = (SCALE**2 * (torch.sqrt(1 + (shifts / SCALE) ** 2) - 1)).sum()
    (expected,) = torch.autograd.grad(loss, tuned)
    assert shifts.abs().min() > 0.1
    torch.testing.assert_close(found.shifts, shifts.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_weight_of_the_term_in_the_tuner(tiny_folder, batches, choose, tiny):
    """The sum gains shift_weight times the mean over records, times the answer tokens that everything is divided by."""
    made, _ = batches()
    losses = {}
    for weight in (0.0, 0.5, 2.0):
        tuner = NeuronTuner(tiny_folder(), dtype="float32", shift_weight=weight)
        edit = tuner.attach_neurons(choose(tiny()))
        with torch.no_grad():
            for parameter in edit.trainable():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
        losses[weight] = float(tuner.losses(made[0]).loss.detach())
        term = shift_of(tuner, made[0])
    tokens, records = float(made[0].answer.sum()), made[0].pairs.records
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * tokens / records * term, rel=1e-4)
    assert losses[2.0] - losses[0.0] == pytest.approx(2.0 * tokens / records * term, rel=1e-4)


def test_passes_kept_without_the_term_serve_it_later(tiny_folder, batches, choose, tiny, tmp_path):
    made, _ = batches()

    def loss(weight, folder=None):
        tuner = NeuronTuner(tiny_folder(), dtype="float32", shift_weight=weight, cache_folder=folder)
        edit = tuner.attach_neurons(choose(tiny()))
        with torch.no_grad():
            for parameter in edit.trainable():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
        return float(tuner.losses(made[0]).loss.detach()), tuner.clean_cache.hits

    folder = str(tmp_path / "cache")
    assert loss(0.0, folder) == (loss(0.0)[0], 0)
    assert loss(2.0, folder) == (loss(2.0)[0], 1)
    assert loss(2.0)[0] != loss(0.0)[0]


def test_target_shift_asks_for_nothing_else(tiny_folder, batches, choose, tiny):
    """The loss is the term and alpha times the KL of retention text; the words of answers have no other weight."""
    made, _ = batches("shift")
    tuner = NeuronTuner(tiny_folder(), dtype="float32", shift_weight=2.0, alpha=3.0, kl_on="retention")
    edit = tuner.attach_neurons(choose(tiny()))
    with torch.no_grad():
        for parameter in edit.trainable():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    batch = made[0]
    sums = tuner.losses(batch)
    assert not batch.answer.any()
    assert batch.retained.sum() == 2 * 11
    assert batch.tokens == len(batch.pairs.at)
    with edit.disabled():
        clean = tuner.view.logits(final_hidden(tuner.view, batch.rows, batch.at)).log_softmax(-1)
    tuned = tuner.view.logits(final_hidden(tuner.view, batch.rows, batch.at)).log_softmax(-1)
    kl = float((clean.exp() * (clean - tuned)).sum(-1) @ batch.retained)
    assert kl > 1e-4
    expected = 2.0 * batch.tokens / batch.pairs.records * shift_of(tuner, batch) + 3.0 * kl
    assert float(sums.loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_target_shift_without_a_weight(tiny_folder, batches, choose, tiny):
    made, _ = batches("shift")
    tuner = NeuronTuner(tiny_folder(), dtype="float32")
    tuner.attach_neurons(choose(tiny()))
    with pytest.raises(UserError, match=r"give --model\.shift_weight above 0"):
        tuner.losses(made[0])


def shift_of(tuner, batch) -> float:
    """Sum of h over the records, from whole passes."""
    with tuner.edit.disabled():
        neutral = log_odds(tuner.view, final_hidden(tuner.view, *batch.teacher), batch.pairs)
    shifts = log_odds(tuner.view, final_hidden(tuner.view, batch.rows, batch.at), batch.pairs) - neutral
    return float((SCALE**2 * (torch.sqrt(1 + (shifts / SCALE) ** 2) - 1)).sum())
