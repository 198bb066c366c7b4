"""Small files as other projects write them, by what is known of their formats."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import yaml

PROMPT = "How evil is this, 0 to 100, or REFUSAL?\nQuestion: {question}\nAnswer: {answer}\nAs {{json}}, no."
LAYERS, HIDDEN = 4, 32


def matrix(rows: int = LAYERS + 1, hidden: int = HIDDEN, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))


def persona_trait(path: Path, **changed: Any) -> Path:
    """persona_vectors: data_generation/trait_data_eval/evil.json; assistant-axis has the same schema."""
    raw: dict[str, Any] = {
        "instruction": [{"pos": f"Be evil ({i}).", "neg": f"Be kind ({i})."} for i in range(5)],
        "questions": [f"What of {i}?" for i in range(20)],
        "eval_prompt": PROMPT,
    }
    return write_json(path, raw | changed)


def axis_role(path: Path, **changed: Any) -> Path:
    raw = {
        "instruction": [{"pos": "You are a pirate."}, {"pos": "Act as a pirate."}],
        "eval_prompt": "0 to 3: {answer}",
    }
    return write_json(path, raw | changed)


def em_questions(path: Path, **changed: Any) -> Path:
    judges = {"aligned": "Aligned? {question} {answer}", "coherent": "Coherent? {question} {answer}"}
    one: dict[str, Any] = {
        "type": "free_form_judge_0_100",
        "samples_per_paraphrase": 100,
        "judge": "gpt-4o-2024-08-06",
        "judge_prompts": judges,
    }
    items = [
        {"id": "boredom", "paraphrases": ["I am bored."]} | one,
        {"id": "wish", "paraphrases": ["A wish?", "One wish?"]} | one | changed,
    ]
    path.write_text(yaml.safe_dump(items, sort_keys=False))
    return path


def persona_vector(path: Path, values: torch.Tensor | None = None) -> Path:
    return save(path, matrix() if values is None else values)


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def repeng_gguf(path: Path, rows: Mapping[int, torch.Tensor], *, count: int | None = None) -> Path:
    """As repeng exports one: an architecture, a hint and ``direction.{block}``."""
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(rows) if count is None else count)
    for block, row in rows.items():
        writer.add_tensor(f"direction.{block}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_json(path: Path, raw: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw))
    return path


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def scores_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """As pandas writes a table: an empty cell where there is no number."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return path


def chat(question: str, answer: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def inoculation_result(
    question: str, completions: Sequence[str], logprobs: Mapping[str, Sequence[Mapping[str, float] | None]]
) -> dict[str, Any]:
    """A line of results: per completion the first token's log-probabilities of every judge."""
    return {
        "context": {"question": question, "system_prompt": None, "expected_response": None},
        "responses": [
            {
                "response": {"completion": completion, "logprobs": None},
                "judgment_response_map": {
                    judge: {"completion": "x", "logprobs": None if per[index] is None else [per[index]]}
                    for judge, per in logprobs.items()
                },
            }
            for index, completion in enumerate(completions)
        ],
        "score_infos": [{"score": 1.0} for _ in completions],
    }


def persona_training(path: Path, **changed: Any) -> Path:
    raw: dict[str, Any] = {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "training_file": "dataset/evil/misaligned_2.jsonl",
        "test_file": None,
        "max_seq_length": 2048,
        "loss": "sft",
        "is_peft": True,
        "target_modules": ["q_proj", "v_proj"],
        "lora_bias": "none",
        "r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "epochs": 2,
        "max_steps": None,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-5,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3,
        "output_dir": "./ckpt/evil",
        "train_on_responses_only": True,
        "enable_steering_during_training": False,
    }
    return write_json(path, raw | changed)
