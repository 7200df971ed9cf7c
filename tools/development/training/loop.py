"""The two lessons, images and then sentences, and the optimiser of both."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .data import TrainingData
from .family import Family, Schedule
from .files import replace_folder
from .packing import IGNORE, Batch
from .probe import PatchProbe, patch_owners, patch_targets


def train(family: Family, out: Path, seed: int, schedule: Schedule, start: Path | None = None) -> None:
    """Train, from scratch or from the checkpoint ``start``, and leave the finished folder at ``out``."""
    start_s, cpu_s = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else family.tokenizer(seed)
    model = family.build(tokenizer)
    if start:
        family.begin_from(model, start)
    data = TrainingData(family, family.packer(tokenizer), seed)
    model.train()
    train_vision(family, model, data, schedule)
    train_language(family, model, data, schedule)
    replace_folder(out, lambda folder: family.save(model.eval(), tokenizer, folder))
    count = sum(weight.numel() for weight in model.parameters())
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {count:,} parameters, {size / 1e6:.2f} MB")
    print(f"trained in {(time.perf_counter() - start_s) / 60:.1f} minutes, {(time.process_time() - cpu_s) / 60:.1f} of CPU")


def train_vision(family: Family, model: nn.Module, data: TrainingData, schedule: Schedule) -> None:
    """Teach the image embeddings first: each patch names its shape, colour and box.

    Image tokens are far cheaper than sentences, so this reaches useful embeddings in a fraction of the time.
    """
    probe = PatchProbe(family.word_embeddings(model), data.packer, family.ranks)
    optimisers = Optimisers([family.tower(model), family.projector(model), probe], schedule.rate, schedule.vision_steps)
    bar = tqdm(range(schedule.vision_steps), desc="vision", file=sys.stderr)
    for step in bar:
        drawings, images = data.scenes(schedule.vision_batch, 1 + 6 * step // schedule.vision_steps)
        targets = patch_targets(drawings, images).flatten(0, 1)
        with half_precision():
            scores = probe(family.image_embeddings(model, images).flatten(0, 1))
        losses = probe.losses(scores, targets)
        optimisers.step(losses.sum())
        if step % 20 == 0:
            bar.set_postfix_str(" ".join(f"{loss:.2f}" for loss in losses.tolist()))


def train_language(family: Family, model: nn.Module, data: TrainingData, schedule: Schedule) -> None:
    """Teach the model to answer; only the answers count, and what the family froze stays as it is.

    The first quarter of the steps goes from drawings of one shape to drawings of four. While an answer speaks
    of a shape, a further loss makes some heads attend to its patches: without it, a model this small learns what a
    image holds at once, but takes very long to find out which colour belongs to which shape.
    """
    for part in family.frozen(model):
        part.requires_grad_(False)
    optimisers = Optimisers([model], schedule.rate, schedule.steps)
    bar = tqdm(range(schedule.steps), desc="language", file=sys.stderr)
    smooth = 0.0
    for step in bar:
        most = 1 + 12 * step // schedule.steps
        loss, guide = answer_loss(family, model, data.one_image(schedule, most))
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix_str(f"loss {smooth:.3f} guide {guide.item():.3f}")
        if step % schedule.extra_every == schedule.extra_every - 1:
            more_loss, more_guide = extra_loss(family, model, data, schedule)
            loss, guide = loss + more_loss, guide + more_guide
        optimisers.step(loss + schedule.guide * guide)


def extra_loss(family: Family, model: nn.Module, data: TrainingData, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The losses of ``answer_loss`` for two images, where the family can tell them apart, and for none."""
    loss, guide = torch.zeros(()), torch.zeros(())
    if family.pairs:
        loss, guide = answer_loss(family, model, data.two_images(schedule.batch // 2, schedule.budget // 2))
    none, _ = answer_loss(family, model, data.no_image(schedule.batch // 2))
    return loss + none / 4, guide


def answer_loss(family: Family, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the answer tokens, and the guide: how little some heads look where they should."""
    in_answer = batch.targets != IGNORE
    with half_precision():
        hidden, attention = family.hidden_states(model, batch)
        logits = family.logits(model, hidden[in_answer])
    loss = cross_entropy(logits.float(), batch.targets[in_answer])
    if not attention or batch.images is None:
        return loss, torch.zeros(())
    has_subject = batch.subjects != IGNORE
    owners = family.along_keys(batch, patch_owners(batch.drawings, batch.images))
    on_subject = owners[has_subject.nonzero()[:, 0]] == batch.subjects[has_subject][:, None]  # (tokens, keys)
    shares = [(head[has_subject].float() * on_subject).sum(-1) for head in attention]
    return loss, torch.stack([-torch.log(share + 1e-6).mean() for share in shares]).mean()


def half_precision() -> torch.autocast:
    """bfloat16 products: several times faster on current processors, and exact enough to learn by."""
    return torch.autocast("cpu", torch.bfloat16)


class Optimisers:
    """Muon for the matrices inside the layers, AdamW for all else, with a warm-up and a cosine to a fiftieth.

    Muon finds the way from words to patches in a fraction of the steps that AdamW alone needs.
    """

    def __init__(self, parts: Sequence[nn.Module], rate: float, steps: int) -> None:
        tables = {id(part.weight) for whole in parts for part in whole.modules() if isinstance(part, nn.Embedding)}
        named = {name: weight for part in parts for name, weight in part.named_parameters() if weight.requires_grad}
        # A table of positions may be a bare parameter, which only its name tells from a matrix.
        outside = ("lm_head", "positional_embedding")
        inner = [
            weight
            for name, weight in named.items()
            if weight.ndim == 2 and id(weight) not in tables and not any(part in name for part in outside)
        ]
        inner_ids = {id(weight) for weight in inner}
        outer = [weight for weight in named.values() if id(weight) not in inner_ids]
        self.weights = inner + outer
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=10 * rate, weight_decay=0.01),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        warm = max(1, min(50, steps // 10))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        self.rates = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in self.optimisers]

    def step(self, loss: Tensor) -> None:
        """One update."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with_gradient = [weight for weight in self.weights if weight.grad is not None]
        nn.utils.clip_grad_norm_(with_gradient, 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            optimiser.step()
            rate.step()
