"""Train the bundled story model, a small ReLU-sparse language model like MiniCPM-S.

    python train.py --data TEXTS --work RUN --export hybrid/models/stories
    python train.py --data TEXTS --work TWIN --dense  # the twin: no sparsity terms

The recipe follows ProSparse (https://arxiv.org/abs/2402.13516). The gate is ReLU from the start. An
L1 term on the FFN activations has a factor that rises smoothly. It is adjusted so that sparsity
follows a cosine ramp to `--target-sparsity`. Then training sets a FATReLU threshold, and continues
with it to the end. It is the largest one that costs less than `THRESHOLD_COST` of the held-out
loss.

The exported model has a higher threshold. It is the lowest one with which every layer is at least
`LEAST_LAYER_SPARSITY` sparse on held-out stories, so the densest layer decides.

The schedule is warm-up, stable, linear decay. The optimiser is Muon for the matrices
(https://kellerjordan.github.io/posts/muon), and AdamW for the embedding and norms.

Runs are seeded, and resume from `--work` automatically. `curves.csv` in that folder has one row per
evaluation, and `curves.png` shows them. The script needs the `train` extra.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from model import Stories, StoriesConfig
from safetensors.torch import save_file
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
VALID_FILE = "tinystories/tinystories_valid.txt"

# From here to DECAY_FROM: shares of all steps.
WARMUP = 0.03
SPARSITY_RAMP = (0.10, 0.70)
THRESHOLD_AT = 0.80
DECAY_FROM = 0.55
LEAST_LAYER_SPARSITY = 0.85
THRESHOLD_COST = 0.002  # share of held-out loss that the threshold may cost when it is set
EVAL_EVERY = 100


def read_stories(path: Path) -> list[str]:
    """Read the stories of a file. Joins paragraphs of hard-wrapped texts and drops blank lines."""
    stories = []
    for text in path.read_text(encoding="utf-8").split(END_OF_TEXT):
        wrapped = path.name.startswith("simple")
        blocks = re.split(r"\n\s*\n", text.strip()) if wrapped else text.strip().split("\n")
        lines = [" ".join(block.split()) for block in blocks]
        if wrapped:
            lines = lines[1:]  # the title
        story = "\n".join(line for line in lines if line)
        if len(story) > 100:
            stories.append(story)
    return stories


def letters(story: str) -> str:
    """Return a key that is equal for two printings of the same story."""
    return re.sub("[^a-z]", "", story.lower())[:80]


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Train BPE with byte fallback, normalised like MiniCPM's (ids 0, 1, 2: unk, bos, eos)."""
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
    # The trainer makes no byte tokens. Insert them after the special ones, as sentencepiece does.
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


class Batches:
    """Windows of `length + 1` ids over the stories, shuffled for each epoch by (seed, epoch)."""

    def __init__(self, stories: list[np.ndarray], length: int, batch_size: int, seed: int) -> None:
        self.stories, self.window, self.batch_size, self.seed = (
            stories,
            length + 1,
            batch_size,
            seed,
        )
        n_windows = sum(map(len, stories)) // self.window
        self.per_epoch = n_windows // batch_size
        self.epoch, self.rows = -1, np.empty((0, self.window), np.int64)

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            ids = np.concatenate([self.stories[i] for i in rng.permutation(len(self.stories))])
            n_windows = len(ids) // self.window
            rows = ids[: n_windows * self.window].reshape(n_windows, self.window)
            self.rows, self.epoch = rows[rng.permutation(n_windows)], epoch
        return torch.from_numpy(self.rows[index * self.batch_size : (index + 1) * self.batch_size])


def run_batch(model: torch.nn.Module, ids: torch.Tensor, device: str) -> tuple[torch.Tensor, ...]:
    ids = ids.to(device)
    with torch.autocast(device, torch.bfloat16):
        return model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, batches: Batches, device: str, limit: int | None = None
) -> tuple[float, np.ndarray]:
    """Return the held-out loss in nats per token, and the active fraction per layer."""
    n_batches = min(limit or batches.per_epoch, batches.per_epoch)
    results = [run_batch(model, batches[step], device) for step in range(n_batches)]
    loss = float(np.mean([result[0].item() for result in results]))
    return loss, np.mean([result[2].float().cpu().numpy() for result in results], 0)


def choose_threshold(model: Stories, batches: Batches, device: str) -> float:
    """Find the largest FATReLU threshold that costs at most THRESHOLD_COST of held-out loss."""
    best, _ = evaluate(model, batches, device, limit=4)
    chosen = 0.0
    for threshold in (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4):
        model.threshold = threshold
        loss, _ = evaluate(model, batches, device, limit=4)
        if loss > best * (1.0 + THRESHOLD_COST):
            break
        chosen = threshold
    return chosen


def raise_threshold(model: Stories, batches: Batches, device: str) -> None:
    """Raise the FATReLU threshold until the densest layer is sparse enough on held-out stories."""
    while True:
        _, active = evaluate(model, batches, device)
        if 1.0 - active.max() >= LEAST_LAYER_SPARSITY:
            return
        model.threshold = round(model.threshold + 0.02, 2)


def learning_rate_factor(progress: float) -> float:
    if progress < WARMUP:
        return progress / WARMUP
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)) * 0.97 + 0.03)


def ramp(progress: float, start: float, end: float) -> float:
    """Return 0 before `start`, 1 after `end`, and half a cosine between them."""
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
    """Write the model as an ordinary Hugging Face folder."""
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
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.1,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def save_curves(folder: Path, rows: list[dict[str, float]]) -> None:
    """Write `curves.csv`, and plot it as `curves.png`."""
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
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the training texts")
    add("--work", type=Path, required=True, help="folder for checkpoints and curves")
    add("--export", type=Path, help="folder for the finished model (default: none)")
    add("--steps", type=int, default=2200, help="number of training steps (default: 2200)")
    add("--batch-size", type=int, default=16, help="windows of 512 tokens per step (default: 16)")
    add("--lr", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    add("--seed", type=int, default=1, help="random seed (default: 1)")
    add(
        "--target-sparsity",
        type=float,
        default=0.90,
        help="FFN sparsity at the end of the ramp (default: 0.9)",
    )
    add("--dense", action="store_true", help="train the twin, without L1 term and threshold")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to train on (default: cuda if there is one, else cpu)",
    )
    add("--no-compile", action="store_true", help="run without torch.compile")
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
    tokenizer_path = args.work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(train_stories, config.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    length = config.max_position_embeddings
    batches = Batches(encode_stories(tokenizer, train_stories), length, args.batch_size, args.seed)
    valid = Batches(encode_stories(tokenizer, valid_stories), length, args.batch_size, 0)

    model = Stories(config).to(args.device)
    optimizers = make_optimizers(model, args.lr)
    compiled = model if args.no_compile else torch.compile(model)
    step, factor, rows, start_fraction = 0, 1e-3, [], 0.0
    checkpoint_path = args.work / "checkpoint.pt"
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, factor, rows = state["step"], state["factor"], state["rows"]
        model.threshold, start_fraction = state["threshold"], state["start_fraction"]
    base_lrs = [[args.lr], [args.lr / 2, args.lr / 2]]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters / 1e6:.2f} M parameters, {len(train_stories)} stories, "
        f"{batches.per_epoch} steps an epoch, from step {step}",
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
        total = loss if args.dense else loss + factor * magnitudes.sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        active = fractions.float().mean().item()
        if progress < SPARSITY_RAMP[0]:
            start_fraction = active
        else:
            # Adjust the factor so that the active fraction follows the ramp down to the target.
            goal = start_fraction + ramp(progress, *SPARSITY_RAMP) * (
                1.0 - args.target_sparsity - start_fraction
            )
            factor = min(max(factor * math.exp(0.1 * (active - goal)), 1e-4), 1.0)
        step += 1
        if step % EVAL_EVERY == 0 or step == args.steps:
            valid_loss, valid_active = evaluate(compiled, valid, args.device)
            row = {
                "step": step,
                "tokens": step * args.batch_size * length,
                "train_loss": round(loss.item(), 4),
                "valid_loss": round(valid_loss, 4),
                "valid_sparsity": round(1.0 - float(valid_active.mean()), 4),
                "l1_factor": round(factor, 6),
                "threshold": model.threshold,
            }
            rows.append(row)
            save_curves(args.work, rows)
            rate = (step - first_step) * args.batch_size * length / (time.monotonic() - started)
            layers = " ".join(f"{1 - a:.2f}" for a in valid_active)
            print(row, f"layers {layers}, {rate:.0f} tok/s", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "factor": factor,
                "rows": rows,
                "threshold": model.threshold,
                "start_fraction": start_fraction,
            }
            torch.save(state, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)
    if args.export:
        if not args.dense:
            raise_threshold(model, valid, args.device)
        export(model, tokenizer, args.export)


if __name__ == "__main__":
    main()
