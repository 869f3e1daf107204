"""What a unit owns, by hand for tiny models: d 16, m 24, two heads of size 8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bad_neurons.errors import UserError
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.axes import PARTS, owned, unit_width, units
from bad_neurons.testing import tiny_model


def test_rows_and_columns():
    rows = {axis: {part.matrix: part.rows for part in parts} for axis, parts in PARTS.items()}
    assert rows == {
        "residual": {"gate_proj": False, "up_proj": False, "down_proj": True},
        "intermediate": {"gate_proj": True, "up_proj": True, "down_proj": False},
        "heads": {"q_proj": True, "o_proj": False},
    }
    assert all(part.dim == (0 if part.rows else 1) for parts in PARTS.values() for part in parts)


def test_sizes(family):
    view = view_decoder(tiny_model(family))
    assert {axis: (units(view, axis), unit_width(view, axis)) for axis in PARTS} == {
        "residual": (16, 1),
        "intermediate": (24, 1),
        "heads": (2, 8),
    }


def test_owned():
    view = view_decoder(tiny_model("llama"))
    assert owned(view, "residual", [0, 5]) == owned(view, "intermediate", [0, 5]) == [0, 5]
    assert owned(view, "heads", [1]) == list(range(8, 16))
    assert owned(view, "heads", [1, 0]) == [*range(8, 16), *range(8)]


def test_all_units_own_everything_once(family):
    view = view_decoder(tiny_model(family))
    for axis, parts in PARTS.items():
        for part in parts:
            weight = view.layers[0].matrix(part.matrix).weight
            assert owned(view, axis, range(units(view, axis))) == list(range(weight.shape[part.dim]))


def test_a_head_s_rows_make_what_its_columns_read(family, ids):
    # another query of a head changes what its own columns of o_proj read, and no other
    model = tiny_model(family)
    view, seen = view_decoder(model), []
    attention = view.layers[2].attention
    attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
        attention.q_proj.weight[owned(view, "heads", [1])] *= -2.0
        model(input_ids=ids)
    changed = (seen[0] != seen[1]).flatten(0, 1).any(0).nonzero().flatten().tolist()
    assert changed == owned(view, "heads", [1])


def test_other_attention_is_refused():
    model = tiny_model("llama")
    view, attention = view_decoder(model), model.model.layers[0].self_attn
    attention.q_proj = nn.Linear(16, 32)
    with pytest.raises(UserError, match="q_proj holds more than the queries"):
        units(view, "heads")
    del attention.o_proj
    with pytest.raises(UserError, match="LlamaAttention has no o_proj"):
        units(view, "heads")
