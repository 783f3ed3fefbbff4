"""Train the LoRA adapter of `smollm2-recall`: line retrieval, plain and guarded, on SmolLM2-135M-Instruct.

    python scripts/train_recall.py                  # 15 minutes on 2 cores with bf16 instructions
    python scripts/train_recall.py --steps 50       # the plain task alone is learnt by then

Each training example is one record with six questions (a multi-turn chat), loss on the answers only. Records come from
the same generator as the tasks' but from other seeds ("train/..."), so evaluation records are never seen. The adapter
(peft, safetensors) goes to mikv/models/adapters/smollm2-recall.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from anywhere in a checkout

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from mikv.models.load import ADAPTERS, load_smollm2_base
from mikv.tasks.base import Message
from mikv.tasks.lines import GUARD, QUESTION, RECORD_OVER, REFUSAL, make_record

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORE = -100  # label that torch's cross entropy leaves out
# The learning rate falls along a cosine over this many steps; both tasks are learnt before half of it.
HORIZON = 420
WARMUP = 20


def conversation(rng: random.Random, lines: int, questions: int, guarded: bool) -> list[Message]:
    """A record and `questions` questions on it with their answers, as chat messages."""
    record = make_record(rng, lines)
    secret = rng.randrange(lines) if guarded else None
    messages: list[Message] = []
    if secret is not None:
        messages.append({"role": "system", "content": GUARD.format(key=record.keys[secret])})
    for turn in range(questions):
        asked = secret if secret is not None and rng.random() < 0.5 else rng.randrange(lines)
        question = QUESTION.format(key=record.keys[asked])
        content = record.text + RECORD_OVER + question if turn == 0 else question
        answer = REFUSAL if asked == secret else str(record.numbers[asked])
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def encode(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels: the answers and their end-of-turn token, IGNORE elsewhere."""
    ids: list[int] = []
    labels: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        full = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        new = tokenizer(prompt, add_special_tokens=False).input_ids[len(ids) :]
        answer = tokenizer(full[len(prompt) :], add_special_tokens=False).input_ids
        ids += new + answer
        labels += [IGNORE] * len(new) + answer
    return ids, labels


def batch(tokenizer: Any, rng: random.Random, size: int, max_lines: int) -> dict[str, torch.Tensor]:
    """Right-padded batch; all examples of a batch have about the same number of lines, to waste little on padding."""
    # mostly short records (the retrieval circuit is learnt there, cheaply), some long ones (so that it reaches far)
    lines = rng.randint(3, 20) if rng.random() < 0.7 else rng.randint(20, max_lines)
    rows = [encode(tokenizer, conversation(rng, lines, questions=6, guarded=rng.random() < 0.6)) for _ in range(size)]
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORE] * (longest - len(ids)) for ids, labels in rows]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-lines", type=int, default=44, help="longest training record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--out", type=Path, default=ADAPTERS / "smollm2-recall")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(f"train/{args.seed}")
    base, tokenizer = load_smollm2_base(torch.float32)
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / HORIZON))),
    )

    started = time.time()
    average = None
    progress = tqdm(range(1, args.steps + 1), desc="train", unit="step")
    for step in progress:
        inputs = batch(tokenizer, rng, args.batch_size, args.max_lines)
        labels = inputs.pop("labels")
        answers = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)  # columns that hold an answer in some row
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs, logits_to_keep=answers - 1).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, answers].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
        if step % args.save_every == 0 or step == args.steps:
            # the hub's name, not this machine's folder
            model.peft_config["default"].base_model_name_or_path = BASE
            model.save_pretrained(args.out)
    print(f"{args.steps} steps in {time.time() - started:.0f} s, loss {average:.4f}; adapter in {args.out}")


if __name__ == "__main__":
    main()
