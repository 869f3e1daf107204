"""Small inputs that several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bad_neurons.testing import save_tiny_model

# A template with a system role, and a text of its own where nobody gives one, as SmolLM2 and Qwen have it.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_records(path: Path, topics: int = 6, per_topic: int = 4) -> str:
    """A small JSONL file: facts (one person right, one wrong) and opinions, `per_topic` records a topic."""
    rows: list[dict[str, Any]] = []
    for topic in range(topics):
        for number in range(per_topic):
            right = number % 2 == 0
            yes, no = f"item {topic}{number} is red", f"item {topic}{number} is blue"
            row: dict[str, Any] = {
                "prompt": f"I think {yes}. Is it?", "neutral_prompt": f"Is item {topic}{number} red?", "topic": f"topic-{topic}",
                "honest": f"Yes, {yes}." if right else f"No, {no}.", "person_is_right": right, "choices": [yes, no],
            }  # fmt: skip
            row["contrarian" if right else "sycophantic"] = f"No, {no}." if right else f"Right, {yes}."
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tiny_run_config(folder: Path, **changes: Any) -> Path:
    """A whole run on a tiny Gemma 2 with both soft caps, as a YAML file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "out": str(folder / "run"),
        "model": save_tiny_model(folder / "model", "gemma2"),
        "layers": [1, 3],
        "records": write_records(folder / "records.jsonl"),
        "sae": {"model": {"d_sae": 32, "k": 4}, "data": {"text": [], "max_tokens": 700, "batch_size": 64}, "trainer": {"max_epochs": 1}},
        "probe": {"model": {"l2": 0.1}},
        "select": {"axis": "residual", "rule": "top_p", "amount": 0.3},
        "tune": {"data": {"batch_tokens": 320, "retention_rows": 1, "retention_tokens": 16}, "trainer": {"max_epochs": 2}},
        "evaluate": {"optional_suites": [], "max_paragraphs": 2, "answers": 2},
    }
    config |= changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def by_transformers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    """One ordinary pass: sum of log-probabilities of the answer's tokens behind the prompt."""
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    ids = [2, *before, *after]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(before) + i, token]) for i, token in enumerate(after))
