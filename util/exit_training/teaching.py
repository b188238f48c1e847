"""Step 3: teach exit adapters, one behind each candidate layer, on states of the frozen layers.

    teaching = Teaching(views, states, rows, held_out, costs, flags, folder)
    best = teaching.run()

Several processes (torchrun) read different rows and average their gradients. What is taught so far lies in
`folder` after every evaluation; a run that was killed goes on from there.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import UserError
from models.exit_adapter import ExitAdapter
from util.exit_training.flags import ExitTrainingArguments
from util.exit_training.forecast import ExitCosts, ExitTrace, Forecast, best, forecast, trace_exit
from util.exit_training.objectives import LOSSES, LayeredView, acceptance, exit_logits, teacher_of
from util.exit_training.states import Batch, States, make_batch
from util.files import write_json
from util.progress import Progress

CHECKPOINT, CURVE = "teaching.pt", "curve.json"
PHASES = {  # the objective and its share of the learning rate, one after the other: plateau
    "kl": (("kl", 1.0), ("kl", 0.3), ("kl", 0.1)),
    "acceptance": (("acceptance", 1.0), ("acceptance", 0.3), ("acceptance", 0.1)),
    "both": (("kl", 1.0), ("kl", 0.3), ("acceptance", 0.3), ("acceptance", 0.1)),
}
WARM_UP = 50  # steps
GAIN = 1.003  # of the objective, below which an evaluation brought nothing
PATIENCE = 3  # evaluations
LARGEST_NORM = 1.0


@dataclass
class Standing:
    """How far teaching is; all that a run which goes on needs, besides weights."""

    step: int = 0
    phase: int = 0
    waited: int = 0  # evaluations without a gain
    best_score: float = 0.0  # of this phase's and earlier ones'
    curve: list[dict[str, Any]] = field(default_factory=list)


class Teaching:
    def __init__(
        self,
        views: dict[int, LayeredView],
        states: States,
        rows: Sequence[int],
        held_out: Sequence[int],
        costs: dict[int, ExitCosts],
        flags: ExitTrainingArguments,
        identity: dict[str, Any],
    ) -> None:
        """`views`: by candidate layer, each with its own adapter; `rows`, `held_out`: numbers in `states`."""
        self.views = views
        self.states = states
        self.rows = list(rows)
        view = next(iter(views.values()))
        self.held_out = [make_batch(view, states.rows([number])) for number in held_out]
        self.costs = costs
        self.flags = flags
        self.identity = identity
        self.folder = Path(flags.output_dir)
        self.standing = Standing()
        self.adapters = {layer: adapter_of(view) for layer, view in views.items()}
        self.parameters = [weight for one in self.adapters.values() for weight in one.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=flags.learning_rate, weight_decay=0.0)
        self.best_weights = self.weights()
        self.phases = PHASES[flags.exit_loss]
        self.to_plateau = flags.lr_schedule == "plateau"

    def run(self) -> dict[int, list[Forecast]]:
        """Teach until the forecast stops improving or `--max_steps`; the forecasts of the best weights."""
        for weight in self.parameters:
            weight.requires_grad_(True)
        self.resume()
        batches = self.batches()
        with Progress("Teaching", self.flags.max_steps, "step", self.standing.step) as progress:
            while self.standing.phase < len(self.phases) and self.standing.step < self.flags.max_steps:
                loss = self.learn(next(batches))
                progress.update()
                last = self.standing.step == self.flags.max_steps
                if last or self.standing.step % self.flags.eval_steps == 0:
                    self.judge(loss)
        self.restore(self.best_weights)
        for weight in self.parameters:
            weight.requires_grad_(False)
        return self.forecasts()[0]

    def learn(self, batch: Batch) -> float:
        """One step of all adapters: the loss, averaged over them."""
        standing, (objective, share) = self.standing, self.pace()
        warm = min(1.0, (standing.step + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.flags.learning_rate * share * warm
        losses = []
        weights = torch.where(batch.outputs, 1.0, self.flags.prompt_weight)
        for view in self.views.values():
            with torch.autocast(weights.device.type, torch.bfloat16, enabled=self.flags.bf16):
                losses_of_tokens = LOSSES[objective](exit_logits(view, batch), teacher_of(view, batch))
            loss = (losses_of_tokens * weights).sum() / weights.sum()
            loss.backward()
            losses.append(loss.item())
        average_gradients(self.parameters)
        for adapter in self.adapters.values():
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        standing.step += 1
        return sum(losses) / len(losses)

    def pace(self) -> tuple[str, float]:
        """The objective of this step and its share of the learning rate."""
        if self.to_plateau:
            return self.phases[self.standing.phase]
        objectives = [*dict.fromkeys(objective for objective, _ in self.phases)]  # in turn, for as many steps
        done = self.standing.step / self.flags.max_steps
        return objectives[int(done * len(objectives))], (1 + math.cos(math.pi * done)) / 2

    def judge(self, loss: float) -> None:
        """Forecast what the exits bring by now; end a phase that brings nothing more."""
        standing = self.standing
        forecasts, said = self.forecasts()
        score = self.score(forecasts)
        standing.curve.append({"step": standing.step, "loss": loss, "score": score, "exits": said})
        gained = score > GAIN * standing.best_score
        standing.waited = 0 if gained else standing.waited + 1
        if score > standing.best_score:
            standing.best_score, self.best_weights = score, self.weights()
        if self.to_plateau and standing.waited >= PATIENCE:
            standing.phase, standing.waited = standing.phase + 1, 0
            self.restore(self.best_weights)
        self.report(loss, said)
        self.save()

    def score(self, forecasts: dict[int, list[Forecast]]) -> float:
        """The speed-up of the fastest lossless setting of any exit, the same in all processes."""
        fastest = (best(own, lossless=True) for own in forecasts.values())
        score = torch.tensor(max(one.speedup for one in fastest if one is not None))
        if dist.is_initialized():
            dist.broadcast(score, 0)
        return float(score)

    @torch.no_grad()
    def forecasts(self) -> tuple[dict[int, list[Forecast]], dict[int, dict[str, float]]]:
        """By layer: forecasts of all settings, and the figures that are shown."""
        forecasts, said = {}, {}
        for layer, view in self.views.items():
            traces, accepted = self.trace(view)
            forecasts[layer] = forecast(self.costs[layer], traces)
            lossless = best(forecasts[layer], lossless=True)
            free = best(forecasts[layer], lossless=False, min_agreement=self.flags.min_agreement)
            assert lossless is not None
            total = sum(len(trace.agrees) for trace in traces)
            said[layer] = {
                "agreement": sum(int(trace.agrees.sum()) for trace in traces) / total,
                "acceptance": accepted,
                "lossless": lossless.speedup,
                "free": free.speedup if free is not None else math.nan,
            }
        return forecasts, said

    def trace(self, view: LayeredView) -> tuple[list[ExitTrace], float]:
        """Of every held-out text, and the mean probability that a sampled draft is accepted."""
        traces, accepted, tokens = [], 0.0, 0
        adapter = adapter_of(view)
        for batch in self.held_out:
            logits, own = exit_logits(view, batch), batch.outputs
            accepted += float(acceptance(logits, teacher_of(view, batch))[own].sum())
            tokens += int(own.sum())
            said = places(adapter, batch.tokens[own])
            traces.append(trace_exit(logits[own], said, adapter.shortlist is not None))
        return traces, accepted / tokens

    def batches(self) -> Iterator[Batch]:
        """Endless: texts of this process in random order, of similar length together. Those that were learnt
        from before an interruption are left out."""
        view, learnt = next(iter(self.views.values())), self.standing.step
        for epoch in itertools.count():
            generator = random.Random(f"{self.flags.seed} {epoch}")
            groups = group_rows(self.rows, self.states.sizes, self.flags.batch_tokens, generator)
            for place, group in enumerate(groups[learnt:], learnt):
                runs = random.Random(f"{self.flags.seed} {epoch} {place}")
                yield make_batch(view, self.states.rows(group), runs)
            learnt = max(0, learnt - len(groups))

    def weights(self) -> dict[int, dict[str, Tensor]]:
        return {
            layer: {name: weight.detach().clone() for name, weight in adapter.state_dict().items()}
            for layer, adapter in self.adapters.items()
        }

    def restore(self, weights: dict[int, dict[str, Tensor]]) -> None:
        for layer, adapter in self.adapters.items():
            adapter.load_state_dict(weights[layer])

    def save(self) -> None:
        if position()[0] > 0:
            return
        path = self.folder / CHECKPOINT
        content = {
            "identity": self.identity,
            "standing": vars(self.standing),
            "weights": self.weights(),
            "best": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(content, temporary)
        temporary.replace(path)
        write_json(self.folder / CURVE, self.standing.curve)

    def resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_other_teaching(path, content["identity"], self.identity)
        self.standing = Standing(**content["standing"])
        self.restore(content["weights"])
        self.best_weights = content["best"]
        self.optimizer.load_state_dict(content["optimizer"])

    def report(self, loss: float, said: dict[int, dict[str, float]]) -> None:
        if position()[0] > 0:
            return
        for layer, figures in said.items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"step {self.standing.step}  loss {loss:.3f}  layer {layer}: {shown}", flush=True)


def adapter_of(view: LayeredView) -> ExitAdapter:
    assert view.exit_adapter is not None
    return view.exit_adapter


def places(adapter: ExitAdapter, tokens: Tensor) -> Tensor:
    """Where tokens (N,) stand on the shortlist, -1 if they do not; without one, the tokens themselves."""
    if adapter.shortlist is None:
        return tokens
    found = tokens[:, None] == adapter.shortlist
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


def group_rows(rows: list[int], sizes: list[int], tokens: int, generator: random.Random) -> list[list[int]]:
    """Rows in groups of about so many predicted tokens, alike in length, in random order."""
    order = sorted(rows, key=lambda row: (sizes[row], generator.random()))
    groups: list[list[int]] = [[]]
    held = 0
    for row in order:
        if held + sizes[row] > tokens and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += sizes[row]
    generator.shuffle(groups)
    return groups


def position() -> tuple[int, int]:
    """Which process of how many this is."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    for weight in parameters:
        if weight.grad is not None:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


def refuse_other_teaching(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = ", ".join(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))
    if changed:
        raise UserError(
            f"--output_dir: {path} was begun with other {changed}: name those, or another folder."
        )
