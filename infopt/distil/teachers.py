"""What is learned of an example: the losses of one student against its teacher, asked beforehand or in every step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infopt.distil import losses, states, targets
from infopt.distil.examples import Batch
from infopt.distil.gathering import Gathered
from infopt.distil.losses import Divergence, Likeliest, Target
from infopt.distil.students import listening
from infopt.errors import InputError
from infopt.model import same_tokens
from infopt.protocols import Context

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


@dataclass(frozen=True)
class Signals:
    """What is learned of an example: the options of `distil` of these names."""

    teacher: str | None = None
    logits: float = 1.0
    tokens: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    divergence: Divergence = "forward"
    temperature: float = 1.0
    likeliest: int | None = 128
    measure: str = "loss"

    @property
    def is_live(self) -> bool:
        """Whether the teacher is asked in every step."""
        return bool(self.hidden or self.attention or (self.logits and self.likeliest is None))

    @property
    def has_teacher(self) -> bool:
        return bool(self.logits or self.hidden or self.attention or self.measure == "agreement")


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
                value = float(((found.argmax(-1) != best).float() * batch.weights).sum() / batch.weights.sum())
            else:
                inside = self._inside(out, told, batch)
                value = self._loss(found, target, batch)[0] + (0.0 if inside is None else float(inside))
            total += value * float(batch.weights.sum())
            weight += float(batch.weights.sum())
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
            count = self.signals.likeliest
            return logits if count is None else Likeliest.of(logits, count, self.signals.temperature)
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


@contextmanager
def asking(signals: Signals, bundle: Bundle, learned: Gathered, context: Context) -> Iterator[Asked]:
    """Opens the teacher and, unless it runs in every step, lets it say all it has to. Raises InputError, DiskFullError."""
    require_known(bundle.model, "the student", bundle, learned)
    asked = Asked(signals, bundle.model, learned, bundle.device)
    if not signals.has_teacher:
        yield asked
        return
    assert context.open_model is not None, "a teacher is opened by whoever runs the recipe"
    teacher: Any = context.open_model(signals.teacher).model
    require_known(teacher, "the teacher", bundle, learned)
    ours, theirs = (each.config.get_text_config() for each in (asked.student, teacher))
    if not signals.is_live:
        folder = context.unfinished / "teacher" if context.unfinished else None
        with _folder(folder) as place:
            asked.kept = targets.keep(
                teacher, learned.examples, signals.likeliest or 1, Path(place), bundle.device, context.progress,
                temperature=signals.temperature, vocabulary=min(ours.vocab_size, theirs.vocab_size),
            )  # fmt: skip
        del teacher
        yield asked
        return
    _require_same_rows(ours.vocab_size, theirs.vocab_size)
    asked.teacher = teacher
    asked.pairs = states.pairs(ours.num_hidden_layers, theirs.num_hidden_layers)
    if signals.hidden:
        asked.states = states.HiddenStates(asked.pairs, ours.hidden_size, theirs.hidden_size, context.seed).to(bundle.device)
    before = asked.student.config._attn_implementation
    if signals.attention:  # kernels that keep no attention matrix cannot show one
        asked.student.set_attn_implementation("eager")
        teacher.set_attn_implementation("eager")
    try:
        yield asked
    finally:
        if signals.attention:
            asked.student.set_attn_implementation(before)


def _folder(folder: Path | None) -> AbstractContextManager[Any]:
    """That folder; else one that is gone when what was kept in it is open: its pages stay as long as they are mapped."""
    return tempfile.TemporaryDirectory(prefix="infopt-teacher-") if folder is None else nullcontext(folder)


def require_same_tokens(bundle: Bundle, context: Context, name: str | None) -> None:
    """Raises InputError for a teacher to whom ids mean other tokens. No weight of it is read."""
    assert context.open_tokenizer is not None, "a teacher is opened by whoever runs the recipe"
    gap = same_tokens.difference(bundle.tokenizer, context.open_tokenizer(name))
    if gap:
        raise InputError(
            f"distil.teacher: {name or 'the reference'} knows other tokens than the student ({gap}); allowed: a teacher with "
            "the same tokenizer",
            hint="let it write answers elsewhere, and learn those as rows: tokens: 1, logits: 0; trim_vocab comes after distil",
        )


def require_known(model: Any, whose: str, bundle: Bundle, learned: Gathered) -> None:
    """Raises InputError for a token that a model has no row for: tokenizers may differ by a few special ones."""
    rows = model.get_input_embeddings().weight.shape[0]
    unknown = max((token for each in learned.examples for token in each.ids), default=0)
    if unknown >= rows:
        name = bundle.tokenizer.convert_ids_to_tokens(unknown)
        raise InputError(
            f"distil: the rows have the token {unknown} ({name}); allowed: 0 … {rows - 1}, which {whose} knows",
            hint="take the rows out that use it",
        )


def _require_same_rows(ours: int, theirs: int) -> None:
    """Raises InputError for tables of tokens that are padded to different lengths, which whole distributions cannot have."""
    if ours != theirs:
        raise InputError(
            f"distil: the teacher's table has {theirs} rows, the student's {ours}; allowed: the same number where the teacher is "
            "asked in every step",
            hint="likeliest: 128, without hidden and attention",
        )
