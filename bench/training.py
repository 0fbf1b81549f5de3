"""Trains the small Llamas of ``bench.models.TRAINED`` on the text of Debian packages.

Everything follows from the seed, the packages' text and the number of steps: the split, the tokenizer, the order of the
rows and the weights (on one thread of one kind of CPU; other kinds round otherwise).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.run import machine
from bench.texts import handbook_pages, python_pages
from lorc_fx.console import write_json
from lorc_fx.models import replaced_whole

#: text that neither the tokenizer nor the weights have seen, beside each checkpoint
HELD_OUT = "held_out.txt"
#: (share of the steps, rows in a step, tokens of a row): a small model learns words from many steps of short rows, then
#: all its positions. With Muon for the layers: 200 s of one core left 5.11 nats by rows of 128 and 5.39 by rows of 256;
#: with AdamW alone 5.54
STAGES = ((0.88, 8, 128), (0.12, 2, None))
PEAK_LR, WARMUP, CLIP = 4e-3, 60, 1.0
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
    return split_rows(tokens_of(texts, tokenizer), tokenizer.bos_token_id, length)


def tokens_of(texts: list[str], tokenizer: Any) -> list[int]:
    """Token ids of the texts one after another, nothing between them."""
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]


def split_rows(body: list[int], first: int, length: int) -> torch.Tensor:
    """Token ids [rows, length]: ``first``, then ``length`` - 1 of the body; the rest is dropped."""
    whole = len(body) // (length - 1)
    rows = torch.tensor(body[: whole * (length - 1)]).view(whole, length - 1)
    return torch.cat([torch.full((whole, 1), first), rows], dim=1)


def batches(rows: Callable[[int], torch.Tensor], longest: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Token ids [rows, length] of each step, by ``STAGES``; ``rows`` makes all rows of a length."""
    begin = 0
    for i, (share, count, length) in enumerate(STAGES):
        end = steps if i == len(STAGES) - 1 else begin + round(share * steps)
        known = rows(length or longest)
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed + i))
        for step in range(end - begin):
            yield known[order[torch.arange(step * count, (step + 1) * count) % len(known)]]
        begin = end


def quick_in_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32, and not many times as slowly (as those with AVX2 alone)."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and vectors; AdamW for all where bf16, which Muon
    multiplies in, is slow."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and ".layers." in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim > 1 and ".layers." not in name]
    groups = [
        {"params": embeddings, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if not quick_in_bf16():
        return [
            torch.optim.AdamW([*groups, {"params": matrices, "weight_decay": 0.1}], lr=PEAK_LR / 2, betas=(0.9, 0.95))
        ]
    muon = torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))]


def train(config: Any, rows: Callable[[int], torch.Tensor], steps: int, seed: int = 0) -> tuple[Any, list[float], int]:
    """A model after ``steps`` (matmuls in bf16 where the CPU is fast at it, weights in fp32; warm-up, then a cosine to
    a tenth), its loss in nats at each step, and the tokens it has seen."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    both = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: learning_rate(step, steps)) for each in both]
    losses, seen, begin = [], 0, time.perf_counter()
    quick = quick_in_bf16()
    for step, batch in enumerate(batches(rows, config.max_position_embeddings, steps, seed)):
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seen += batch.numel()
        if (step + 1) % 100 == 0:
            recent = sum(losses[-100:]) / 100
            print(f"  step {step + 1}/{steps}: {recent:.3f} nats, {time.perf_counter() - begin:.0f} s", flush=True)
    return model.eval(), losses, seen


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
    held_out = token_rows([texts.held_out], tokenizer, config.max_position_embeddings)
    body = tokens_of(texts.train, tokenizer)
    print(f"{folder.name}: {len(body):,} tokens to train on, {held_out.numel():,} held out", flush=True)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model, losses, seen = train(config, lambda length: split_rows(body, tokenizer.bos_token_id, length), steps)
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
                "tokens_seen": seen,
                "train_tokens": len(body),
                "held_out_tokens": held_out.numel(),
                "held_out_nats": found,
                "train_nats": losses,
            },
        )
    print(json.dumps({"model": folder.name, "held_out_nats": round(found, 4), "folder": str(folder)}), flush=True)
    return found
