"""Train the bundled story model: a small ReLU-sparse language model of MiniCPM-S's own
architecture.

    python tools/train_stories.py --data TEXTS --work RUN --export hybrid/models/stories
    python tools/train_stories.py --data TEXTS --work TWIN --dense --branch-from RUN  # the twin

Recipe, in the spirit of ProSparse (https://arxiv.org/abs/2402.13516): ReLU gate from the start; an
L1 term on the FFN activations, whose factor is steered layer by layer so that sparsity follows a
cosine ramp to `--target-sparsity`; then a FATReLU threshold, the largest that costs less than
`THRESHOLD_COST` of held-out loss, with which training ends. Schedule: warm-up, stable, linear
decay. Data as MiniCPM's (https://arxiv.org/abs/2404.06395): broader texts beside the stories while
the learning rate is stable, stories alone while it decays. Optimiser: Muon for the matrices
(https://kellerjordan.github.io/posts/muon), AdamW for embedding and norms.

The twin has the same data, seed and schedule, no L1 term and no threshold; it branches off where
the L1 term begins, since up to there the two are one.

Seeded; resumes from `--work` by itself. `curves.csv` and `curves.png` there are written at each
evaluation. Needs the `train` extra.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from safetensors.torch import save_file
from stories_model import Stories, StoriesConfig
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

END_OF_TEXT = "<|endoftext|>"
TRAIN_FILES = (
    "tinystories/tinystories_train.txt",
    "tinystories/tinystories_extra_truecased.txt",
    "simple_english_stories.txt",
)
BROAD_FILES = ("fairytales.txt", "childrens_classics.txt")
VALID_FILE = "tinystories/tinystories_valid.txt"

WARMUP = 0.03  # shares of all steps
SPARSITY_RAMP = (0.30, 0.72)
THRESHOLD_AT = 0.80
DECAY_FROM = 0.55
BROAD_SHARE = 4 / 16  # of the windows of a batch before the decay
THRESHOLD_COST = 0.002  # share of held-out loss that the threshold may cost when it is set
BRANCH_FILE = "checkpoint_at_ramp.pt"  # where the twin branches off
EVAL_EVERY = 100  # steps
EVAL_BATCH = 16  # windows


def read_stories(path: Path) -> list[str]:
    """Stories of one file; paragraphs of hard-wrapped texts are joined, blank lines dropped."""
    stories = []
    for text in path.read_text(encoding="utf-8").split(END_OF_TEXT):
        wrapped = path.name.startswith("simple")
        blocks = re.split(r"\n\s*\n", text.strip()) if wrapped else text.strip().split("\n")
        lines = [" ".join(block.split()) for block in blocks]
        if wrapped:
            lines = lines[1:]  # the title
        story = straight_quotes("\n".join(line for line in lines if line))
        if len(story) > 100:
            stories.append(story)
    return stories


def read_books(path: Path) -> list[str]:
    """Long texts of one file as plain paragraphs: without headings, rules and emphasis."""
    books = []
    for text in path.read_text(encoding="utf-8").split(END_OF_TEXT):
        text = re.sub(r"[*_]", "", straight_quotes(text))
        lines = [" ".join(line.split()) for line in text.split("\n")]
        books.append("\n".join(line for line in lines if line and not re.match("#|-{3}", line)))
    return books


def straight_quotes(text: str) -> str:
    return text.translate(str.maketrans("“”‘’", "\"\"''"))


def letters(story: str) -> str:
    """A key under which two printings of one story are equal."""
    return re.sub("[^a-z]", "", story.lower())[:80]


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """BPE with byte fallback, normalised as MiniCPM's own (ids 0, 1, 2: unk, bos, eos)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(Regex("[.,!?;:]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(byte_tokens),
        special_tokens=special,
        limit_alphabet=120,
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.add_special_tokens(special)
    # The trainer knows no byte tokens: put them behind the special ones, as sentencepiece does.
    state = json.loads(tokenizer.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    order = special + byte_tokens + [piece for piece in pieces if piece not in special]
    assert len(order) == vocab_size == len(set(order))
    state["model"]["vocab"] = {piece: index for index, piece in enumerate(order)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def encode_stories(tokenizer: Tokenizer, stories: list[str]) -> list[np.ndarray]:
    return [np.array([*encoding.ids, 2], np.int64) for encoding in tokenizer.encode_batch(stories)]


class Windows:
    """An endless sequence of windows of `length + 1` ids, shuffled anew each epoch by (seed,
    epoch).
    """

    def __init__(self, texts: list[np.ndarray], length: int, seed: int) -> None:
        self.texts, self.window, self.seed = texts, length + 1, seed
        self.per_epoch = sum(map(len, texts)) // self.window
        self.epoch, self.rows = -1, np.empty((0, self.window), np.int64)

    def take(self, first: int, n: int) -> np.ndarray:
        """Windows [first, first + n), (n, length + 1)."""
        parts = []
        while n > 0:
            epoch, start = divmod(first, self.per_epoch)
            part = self._of_epoch(epoch)[start : start + n]
            parts.append(part)
            first, n = first + len(part), n - len(part)
        return np.concatenate(parts)

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            ids = np.concatenate([self.texts[i] for i in rng.permutation(len(self.texts))])
            rows = ids[: self.per_epoch * self.window].reshape(self.per_epoch, self.window)
            self.rows, self.epoch = rows[rng.permutation(self.per_epoch)], epoch
        return self.rows


@dataclass(frozen=True, slots=True)
class Batches:
    """What each step trains on: stories, and before the decay some broader texts beside them."""

    stories: Windows
    broad: Windows
    batch_size: int
    n_mixed_steps: int

    def __getitem__(self, step: int) -> torch.Tensor:
        n_broad = round(self.batch_size * BROAD_SHARE)
        n_stories = self.batch_size - n_broad
        if step < self.n_mixed_steps:
            stories = self.stories.take(step * n_stories, n_stories)
            rows = np.concatenate((stories, self.broad.take(step * n_broad, n_broad)))
        else:
            before = self.n_mixed_steps * n_stories
            later = (step - self.n_mixed_steps) * self.batch_size
            rows = self.stories.take(before + later, self.batch_size)
        return torch.from_numpy(rows)


def run_batch(model: torch.nn.Module, ids: torch.Tensor, device: str) -> tuple[torch.Tensor, ...]:
    ids = ids.to(device)
    with torch.autocast(device, torch.bfloat16):
        return model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, windows: Windows, device: str, n_batches: int | None = None
) -> tuple[float, np.ndarray]:
    """Held-out loss in nats per token, and the active fraction per layer."""
    size = EVAL_BATCH
    results = [
        run_batch(model, torch.from_numpy(windows.take(batch * size, size)), device)
        for batch in range(n_batches or windows.per_epoch // size)
    ]
    loss = float(np.mean([result[0].item() for result in results]))
    return loss, np.mean([result[2].float().cpu().numpy() for result in results], 0)


def choose_threshold(model: Stories, windows: Windows, device: str) -> float:
    """The largest FATReLU threshold that costs at most THRESHOLD_COST of the held-out loss."""
    best, _ = evaluate(model, windows, device, n_batches=4)
    chosen = 0.0
    for threshold in (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4):
        model.threshold = threshold
        loss, _ = evaluate(model, windows, device, n_batches=4)
        if loss > best * (1.0 + THRESHOLD_COST):
            break
        chosen = threshold
    return chosen


def learning_rate_factor(progress: float) -> float:
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)) * 0.97 + 0.03)


def ramp(progress: float, start: float, end: float) -> float:
    """0 before `start`, 1 after `end`, half a cosine between."""
    share = min(max((progress - start) / (end - start), 0.0), 1.0)
    return 0.5 - 0.5 * math.cos(math.pi * share)


def make_optimizers(model: Stories, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(
            matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": 0.1, "lr": lr / 2},
                {"params": norms, "weight_decay": 0.0, "lr": lr / 2},
            ],
            betas=(0.9, 0.97),
            fused=True,
        ),
    ]


def export(model: Stories, tokenizer: Tokenizer, folder: Path) -> None:
    """Write an ordinary Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict_for_export(), folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    config = model.config.to_hf(model.threshold)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def save_curves(folder: Path, rows: list[dict[str, float]]) -> None:
    """`curves.csv` and a plot of it."""
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    tokens = [row["tokens"] / 1e6 for row in rows]
    for name in ("train_loss", "valid_loss"):
        axes[0].plot(tokens, [row[name] for row in rows], label=name)
    axes[1].plot(tokens, [row["valid_sparsity"] for row in rows], label="valid_sparsity")
    for axis in axes:
        axis.set(xlabel="million tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the training texts")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and curves go here")
    parser.add_argument("--export", type=Path, help="write the finished model's folder here")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target-sparsity", type=float, default=0.90)
    parser.add_argument("--dense", action="store_true", help="the twin: no L1 term, no threshold")
    parser.add_argument("--branch-from", type=Path, help="the run whose twin this is")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    config = StoriesConfig()

    valid_stories = read_stories(args.data / VALID_FILE)
    held_out = {letters(story) for story in valid_stories}
    stories = {letters(s): s for name in TRAIN_FILES for s in read_stories(args.data / name)}
    train_stories = [story for key, story in stories.items() if key not in held_out]
    broad_texts = [book for name in BROAD_FILES for book in read_books(args.data / name)]
    tokenizer_path = args.work / "tokenizer.json"
    if not tokenizer_path.exists():
        if args.branch_from:
            shutil.copy(args.branch_from / "tokenizer.json", tokenizer_path)
        else:
            train_tokenizer(train_stories, config.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    def windows(texts: list[str], seed: int) -> Windows:
        return Windows(encode_stories(tokenizer, texts), config.max_position_embeddings, seed)

    batches = Batches(
        windows(train_stories, args.seed),
        windows(broad_texts, args.seed),
        args.batch_size,
        int(DECAY_FROM * args.steps),
    )
    valid = windows(valid_stories, 0)

    model = Stories(config).to(args.device)
    optimizers = make_optimizers(model, args.lr)
    compiled = model if args.no_compile else torch.compile(model)
    step, rows = 0, []
    factors = torch.full((config.num_hidden_layers,), 1e-3)
    start_fractions = torch.zeros_like(factors)
    ramp_step = int(SPARSITY_RAMP[0] * args.steps)
    checkpoint_path = args.work / "checkpoint.pt"
    from_path = checkpoint_path
    if args.branch_from and not checkpoint_path.exists():
        from_path = args.branch_from / BRANCH_FILE
    if from_path.exists() or args.branch_from:
        state = torch.load(from_path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, rows, model.threshold = state["step"], state["rows"], state["threshold"]
        factors, start_fractions = state["factors"], state["start_fractions"]
    batch_tokens = args.batch_size * config.max_position_embeddings
    base_lrs = [[args.lr], [args.lr / 2, args.lr / 2]]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters / 1e6:.2f} M parameters, {len(train_stories)} stories of "
        f"{batches.stories.per_epoch} windows, {batches.broad.per_epoch} windows of broader texts, "
        f"from step {step}",
        flush=True,
    )

    started, first_step = time.monotonic(), step
    while step < args.steps:
        progress = step / args.steps
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * learning_rate_factor(progress)
        if not args.dense and step == int(THRESHOLD_AT * args.steps):
            model.threshold = choose_threshold(model, valid, args.device)
        loss, magnitudes, fractions = run_batch(compiled, batches[step], args.device)
        is_steered = not args.dense and step >= ramp_step
        total = loss + (factors.to(args.device) * magnitudes).sum() if is_steered else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        active = fractions.float().cpu()
        if step < ramp_step:
            start_fractions = active
        else:
            # Steer the factors so that each layer's active fraction follows the ramp down.
            goal = start_fractions + ramp(progress, *SPARSITY_RAMP) * (
                1.0 - args.target_sparsity - start_fractions
            )
            factors = (factors * torch.exp(0.1 * (active - goal))).clamp(1e-4, 1.0)
        step += 1
        if step % EVAL_EVERY == 0 or step in (ramp_step, args.steps):
            valid_loss, valid_active = evaluate(compiled, valid, args.device)
            row = {
                "step": step,
                "tokens": step * batch_tokens,
                "train_loss": round(loss.item(), 4),
                "valid_loss": round(valid_loss, 4),
                "valid_sparsity": round(1.0 - float(valid_active.mean()), 4),
                "l1_factor": round(factors.mean().item(), 6),
                "threshold": model.threshold,
            }
            rows.append(row)
            save_curves(args.work, rows)
            rate = (step - first_step) * batch_tokens / (time.monotonic() - started)
            layers = " ".join(f"{1 - a:.2f}" for a in valid_active)
            print(row, f"layers {layers}, {rate:.0f} tok/s", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "rows": rows,
                "threshold": model.threshold,
                "factors": factors,
                "start_fractions": start_fractions,
            }
            torch.save(state, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)
            if step == ramp_step and not args.dense:
                shutil.copy(checkpoint_path, args.work / BRANCH_FILE)
    if args.export:
        export(model, tokenizer, args.export)


if __name__ == "__main__":
    main()
