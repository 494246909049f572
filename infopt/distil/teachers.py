"""What is learned of an example: the losses of one student against its teacher, asked beforehand or in every step."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from infopt.distil import losses, states, targets
from infopt.distil.examples import Batch
from infopt.distil.gathering import Gathered
from infopt.distil.losses import Divergence, Likeliest, Target
from infopt.distil.students import listening
from infopt.errors import InputError
from infopt.protocols import Context

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Signals(Protocol):
    """The options of `distil` that say what is learned of an example."""

    @property
    def teacher(self) -> str | None: ...
    @property
    def logits(self) -> float: ...
    @property
    def tokens(self) -> float: ...
    @property
    def hidden(self) -> float: ...
    @property
    def attention(self) -> float: ...
    @property
    def divergence(self) -> Divergence: ...
    @property
    def temperature(self) -> float: ...
    @property
    def likeliest(self) -> int | None: ...
    @property
    def measure(self) -> str: ...
    @property
    def is_live(self) -> bool: ...


@dataclass
class Asked:
    """A student with what its teacher says. `projections` are trained along with it, and thrown away."""

    signals: Signals
    student: Any
    learned: Gathered
    device: torch.device
    teacher: Any = None
    kept: targets.Kept | None = None
    pairs: list[tuple[int, int]] = field(default_factory=list)
    states: states.HiddenStates | None = None

    @property
    def projections(self) -> list[torch.Tensor]:
        return list(self.states.parameters()) if self.states else []

    def learn(self, indices: list[int], share: float) -> float:
        """The loss of a batch, whose gradient, times `share`, is added to that of the weights."""
        batch = Batch.of(self.learned.examples, indices, self.device)
        out, told = self._both(batch)
        found = batch.picked(out.logits)
        total, gradient = self._loss(found.detach(), self._target(batch, told), batch)
        inside = self._inside(out, told, batch)
        if share != 1:
            gradient = gradient.mul_(share)
        if inside is None:
            found.backward(gradient)  # type: ignore[no-untyped-call]
            return total
        torch.autograd.backward([found, inside * share], [gradient, torch.ones_like(inside)])
        return total + float(inside.detach())

    @torch.no_grad()
    def validate(self) -> float:
        """The loss over the validating examples; or the share of tokens that are not the teacher's likeliest."""
        total = weight = 0.0
        for index in self.learned.validation:
            batch = Batch.of(self.learned.examples, [index], self.device)
            out, told = self._both(batch)
            found, target = batch.picked(out.logits), self._target(batch, told)
            if self.signals.measure == "agreement":
                best = target.tokens[:, 0] if isinstance(target, Likeliest) else target.argmax(-1)  # type: ignore[union-attr]
                value = float((found.argmax(-1) != best).float().mean())
            else:
                inside = self._inside(out, told, batch)
                value = self._loss(found, target, batch)[0] + (0.0 if inside is None else float(inside))
            total += value * len(found)
            weight += len(found)
        return total / weight

    def _both(self, batch: Batch) -> tuple[Any, Any]:
        """What student and teacher make of a batch; None for a teacher who was asked before."""
        o = self.signals
        inner = {"output_hidden_states": bool(o.hidden), "output_attentions": bool(o.attention)}
        asked = {"input_ids": batch.ids, "use_cache": False, "logits_to_keep": batch.span, **inner}
        told = None
        if self.teacher is not None:
            with listening(self.device):
                told = self.teacher(**asked)
        return self.student(**asked), told

    def _target(self, batch: Batch, told: Any) -> Target | None:
        if told is not None:
            logits = batch.picked(told.logits)
            return logits if self.signals.likeliest is None else Likeliest.of(logits, self.signals.likeliest)
        return self.kept.of(batch) if self.kept else None

    def _loss(self, found: torch.Tensor, target: Target | None, batch: Batch) -> tuple[float, torch.Tensor]:
        o, parts = self.signals, []
        if o.logits and target is not None:
            parts.append((o.logits, losses.divergence(found, target, o.divergence, o.temperature, batch.weights)))
        if o.tokens:
            parts.append((o.tokens, losses.token_loss(found, batch.tokens, batch.weights)))
        if len(parts) == 1 and parts[0][0] == 1:  # the gradient is as large as the logits: no pass over it for nothing
            return parts[0][1]
        gradient = torch.zeros_like(found)
        for weight, (_, slope) in parts:
            gradient += slope.mul_(weight)
        return sum(weight * value for weight, (value, _) in parts), gradient

    def _inside(self, out: Any, told: Any, batch: Batch) -> torch.Tensor | None:
        o, parts = self.signals, []
        if self.states is not None:
            parts.append(o.hidden * self.states(out, told, batch))
        if o.attention:
            parts.append(o.attention * states.attention(out, told, self.pairs, batch))
        return sum(parts[1:], parts[0]) if parts else None


def ask(signals: Signals, bundle: Bundle, learned: Gathered, context: Context) -> Asked:
    """Opens the teacher and, unless it runs in every step, lets it say all it has to. Raises InputError, DiskFullError."""
    asked = Asked(signals, bundle.model, learned, bundle.device)
    if not (signals.logits or signals.hidden or signals.attention or signals.measure == "agreement"):
        return asked
    assert context.open_model is not None, "a teacher is opened by whoever runs the recipe"
    opened: Bundle = context.open_model(signals.teacher)
    _require_same_tokens(bundle, opened, signals.teacher)
    teacher: Any = opened.model
    if not signals.is_live:
        folder = context.unfinished / "teacher" if context.unfinished else None
        with _folder(folder) as place:
            asked.kept = targets.keep(
                teacher, learned.examples, signals.likeliest or 1, Path(place), bundle.device, context.progress
            )
        return asked
    asked.teacher = teacher
    ours, theirs = (each.config.get_text_config() for each in (asked.student, teacher))
    asked.pairs = states.pairs(ours.num_hidden_layers, theirs.num_hidden_layers)
    if signals.hidden:
        asked.states = states.HiddenStates(asked.pairs, ours.hidden_size, theirs.hidden_size, context.seed).to(bundle.device)
    if signals.attention:  # kernels that keep no attention matrix cannot show one
        asked.student.set_attn_implementation("eager")
        teacher.set_attn_implementation("eager")
    return asked


def _folder(folder: Path | None) -> AbstractContextManager[Any]:
    """That folder; else one that is gone when what was kept in it is open: its pages stay as long as they are mapped."""
    return tempfile.TemporaryDirectory(prefix="infopt-teacher-") if folder is None else nullcontext(folder)


def _require_same_tokens(student: Bundle, teacher: Bundle, name: str | None) -> None:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    sizes = tuple(each.model.config.get_text_config().vocab_size for each in (student, teacher))
    if ours != theirs or sizes[0] != sizes[1]:
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise InputError(
            f"distil.teacher: {name or 'the reference'} knows other tokens than the student ({sizes[1]} against {sizes[0]}; "
            f"{differing} have another number or are not there); allowed: a teacher with the same tokenizer",
            hint="learn what it wrote instead, from rows with its answers: tokens: 1, logits: 0",
        )
