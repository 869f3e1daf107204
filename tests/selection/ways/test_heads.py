"""Effects of heads, against heads that are really patched, in float64 through transformers' own logits."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.data.records import Record
from bad_neurons.errors import UserError
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.ways import Material, scores_of
from bad_neurons.selection.ways.heads import head_effects


def turn(text):
    return ({"role": "user", "content": text},)


RECORDS = [
    Record(turn("I say it is red. Is it?"), "blue", "a", "test", sycophantic="red", neutral_prompt=turn("Which is it?")),
    Record(  # positions that begin alike, and a longer neutral prompt
        turn("Is nine odd? I am sure."),
        "no, never",
        "b",
        "test",
        sycophantic="no doubt",
        neutral_prompt=turn("Tell me if nine is odd"),
    ),
    Record(turn("Yes?"), "yes", "c", "test", contrarian="no", neutral_prompt=turn("Well"), person_is_right=True),
]
WITHOUT = Record(turn("I say so"), "no", "d", "test", sycophantic="yes")


class Heads:
    """Watches what heads hand to ``o_proj``, and mixes something into one of them at given places."""

    def __init__(self, model):
        self.seen, self.mixed = {}, None
        for layer, part in enumerate(model.model.layers):
            part.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, layer=layer: self.pre(layer, args[0]))

    def pre(self, layer, z):
        self.seen[layer] = z.detach().clone()
        if self.mixed is None or self.mixed[0] != layer:
            return None
        _, head, columns, other, share = self.mixed
        z, own = z.clone(), slice(head * 8, head * 8 + 8)
        z[0, columns, own] += share * (other[..., own] - z[0, columns, own])
        return (z,)


def log_prob(model, ids):
    """Log-probability of the answer of a tokenized sequence."""
    log_p = model(input_ids=torch.tensor([ids.prompt + ids.answer])).logits.log_softmax(-1)[0]
    return sum(log_p[len(ids.prompt) - 1 + i, token] for i, token in enumerate(ids.answer)).item()


def patched_effects(model, tokenizer, record, share):
    """Change of the agreeing position's log-odds, [4 layers, 2 heads], by ``share`` of a replacement of one head, over ``-share``."""
    heads, effects = Heads(model), torch.zeros(4, 2, dtype=torch.float64)
    for answer, sign in zip(record.scored, (1, -1), strict=True):
        with_person, without = (tokenize(tokenizer, prompt, answer) for prompt in (record.prompt, record.neutral_prompt))
        log_prob(model, without)
        asked = [range(len(t.prompt) - 1, len(t.prompt) + len(t.answer) - 1) for t in (with_person, without)]
        other = {layer: z[0, list(asked[1])] for layer, z in heads.seen.items()}
        for layer in range(4):
            for head in range(2):
                ends = []
                for size in (share, -share):
                    heads.mixed = (layer, head, list(asked[0]), other[layer], size)
                    ends.append(log_prob(model, with_person))
                heads.mixed = None
                effects[layer, head] -= sign * (ends[0] - ends[1]) / (2 * share)
    return effects


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen3"], indirect=True)
def test_a_small_patch_of_a_head_does_what_its_effect_says(tiny, family):
    lm = tiny(family)
    lm.model.double()  # but softmax and norms are float32 whatever the model is, so the patch must not be too small
    with torch.no_grad():
        expected = torch.stack([patched_effects(lm.model, lm.tokenizer, record, 1e-2) for record in RECORDS]).mean(0)
    lm = tiny(family)
    found = head_effects(view_decoder(lm.model), lm.tokenizer, [*RECORDS, WITHOUT], [0, 1, 2, 3])
    assert expected[1:].abs().min() > 1e-3
    if family.startswith("gemma"):  # whose lowest layer sees eight tokens, which end all of these prompts
        assert expected[0].abs().max() < 1e-4
    assert expected.min() < 0 < expected.max()
    for layer in range(4):
        torch.testing.assert_close(found[layer].double(), expected[layer], rtol=1e-3, atol=3e-4)
    assert not any(m._forward_pre_hooks for m in lm.model.modules())
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_scores(tiny):
    lm = tiny()
    effects = head_effects(view_decoder(lm.model), lm.tokenizer, RECORDS, [3, 1])
    material = Material(lm, layers=[3, 1], axis="heads", records=RECORDS, max_tokens=1)  # one record a batch
    scores = scores_of(material, "heads")
    assert sorted(scores) == [1, 3]
    assert {(tuple(s.shape), s.dtype, s.device.type) for s in scores.values()} == {((2,), torch.float32, "cpu")}
    for layer, value in effects.items():
        torch.testing.assert_close(scores[layer], value.abs(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="--way heads: scores attention heads, not units of the axis residual"):
        scores_of(Material(lm, layers=[1], records=RECORDS), "heads")


def test_a_prompt_without_the_person_has_no_effect(tiny):
    lm = tiny()
    same = Record(turn("Is it?"), "no", "e", "test", sycophantic="yes", neutral_prompt=turn("Is it?"))
    effects = head_effects(view_decoder(lm.model), lm.tokenizer, [same], [0, 3])
    assert all(value.abs().max() < 1e-5 for value in effects.values())


def test_records_need_a_neutral_prompt(tiny):
    lm = tiny()
    with pytest.raises(UserError, match="way heads: no record has a neutral prompt"):
        head_effects(view_decoder(lm.model), lm.tokenizer, [WITHOUT], [0])
    with pytest.raises(UserError, match=r"--layers: \[4\]"):
        head_effects(view_decoder(lm.model), lm.tokenizer, RECORDS, [4])
