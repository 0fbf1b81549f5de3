"""Trains the small Llamas of ``bench.models.TRAINED`` on the text of Debian packages.

Everything follows from the seed, the packages' text and the number of steps: the split, the tokenizer, the order of the
rows and the weights (on one thread of one kind of CPU; other kinds round otherwise).
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.run import machine
from bench.texts import handbook_pages, python_pages
from lorc_fx.console import write_json
from lorc_fx.models import replaced_whole

#: text that neither the tokenizer nor the weights have seen, beside each checkpoint
HELD_OUT = "held_out.txt"
ROWS, PEAK_LR, WARMUP, CLIP = 2, 2e-3, 60, 1.0
#: one page of so many is held out, and its first characters kept: a few long pages would be most of the text
ONE_IN, EXCERPT = 20, 6000


class Texts(NamedTuple):
    """Pages to train on, and one text that is held out."""

    train: list[str]
    held_out: str


def split(folder: Path | None, seed: int = 0) -> Texts:
    """All pages in a random order, whole pages held out. Raises FileNotFoundError, saying how to get them."""
    pages = handbook_pages(folder) + python_pages(folder)
    random.Random(seed).shuffle(pages)
    train = [page for i, page in enumerate(pages) if i % ONE_IN]
    return Texts(train, "\n".join(page[:EXCERPT] for page in pages[::ONE_IN]))


def make_tokenizer(pages: list[str], vocab: int) -> Any:
    """Byte-level BPE of ``vocab`` tokens that puts ``<s>`` before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(pages, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def token_rows(texts: list[str], tokenizer: Any, length: int) -> torch.Tensor:
    """Token ids [rows, length] of the texts one after another; ``<s>`` begins each row; the rest is dropped."""
    body = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    whole = len(body) // (length - 1)
    rows = torch.tensor(body[: whole * (length - 1)]).view(whole, length - 1)
    return torch.cat([torch.full((whole, 1), tokenizer.bos_token_id), rows], dim=1)


def train(config: Any, rows: torch.Tensor, steps: int, seed: int = 0) -> tuple[Any, list[float]]:
    """A model after ``steps`` of AdamW (matmuls in bf16, weights in fp32; warm-up, then a cosine to a tenth), and its
    loss in nats at each step."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    losses, begin = [], time.perf_counter()
    for step in range(steps):
        batch = rows[order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"  step {step + 1}/{steps}: {recent:.3f} nats, {time.perf_counter() - begin:.0f} s", flush=True)
    return model.eval(), losses


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate at a step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


@torch.no_grad()
def mean_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean next-token loss in nats over ``rows`` [rows, length], fp32."""
    return sum(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows) / len(rows)


def make(config: Any, folder: Path, texts: Texts, steps: int) -> float:
    """Train one model and save it to ``folder`` with tokenizer, held-out text and ``training.json``; its held-out loss
    in nats. A folder that was there is replaced when all is done."""
    tokenizer = make_tokenizer(texts.train, config.vocab_size)
    length = config.max_position_embeddings
    rows = token_rows(texts.train, tokenizer, length)
    held_out = token_rows([texts.held_out], tokenizer, length)
    print(f"{folder.name}: {rows.numel():,} tokens to train on, {held_out.numel():,} held out", flush=True)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model, losses = train(config, rows, steps)
    found = mean_loss(model, held_out)
    with replaced_whole(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / HELD_OUT).write_text(texts.held_out, encoding="utf-8")
        write_json(
            new / "training.json",
            {
                "machine": machine(),
                "parameters": model.num_parameters(),
                "steps": steps,
                "tokens_seen": steps * ROWS * length,
                "train_tokens": rows.numel(),
                "held_out_tokens": held_out.numel(),
                "held_out_nats": found,
                "train_nats": losses,
            },
        )
    print(json.dumps({"model": folder.name, "held_out_nats": round(found, 4), "folder": str(folder)}), flush=True)
    return found
