"""How a model's tokens spell rows: prompts as it is asked, answers with the end that it gives them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infopt.data import prompts
from infopt.data.prompts import Message
from infopt.distil.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from infopt.data.lessons import Lesson
    from infopt.data.prompts import Prompt
    from infopt.model.bundle import Bundle


@dataclass(frozen=True)
class Spelling:
    """`ends`: tokens at which engines take an answer to be over; `context`: tokens that the model can read."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    context: int

    @staticmethod
    def of(bundle: Bundle) -> Spelling:
        config, generation = bundle.model.config, getattr(bundle.model, "generation_config", None)
        said: Any = getattr(generation, "eos_token_id", None)
        named = said if isinstance(said, list | tuple) else [said]
        ends = {int(each) for each in (*named, bundle.tokenizer.eos_token_id) if each is not None}
        context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        return Spelling(bundle.tokenizer, frozenset(ends), context)

    def ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def without_end(self, ids: Sequence[int]) -> list[int]:
        kept = list(ids)
        while kept and kept[-1] in self.ends:
            kept.pop()
        return kept

    def example(
        self,
        lesson: Lesson,
        text: str,
        own: Sequence[int] = (),
        reason: int = 0,
        share: float | None = None,
        asked: float = 0.0,
    ) -> Example:
        """`text`: all that is answered. `own`: its tokens and their end, where a model wrote them: they are learned as they are.

        `reason`: characters at its front that say why, whose share in the loss is `share`; None counts every token alike.
        `asked`: weight of each token of the prompt.
        """
        if lesson.prompt is None:
            ids = [int(token) for token in self.tokenizer(text, verbose=False)["input_ids"]]
            end = self.tokenizer.eos_token_id
            return Example.of_text(ids if end is None else [*ids, int(end)])
        prompt, answer = prompts.encode(lesson.prompt, self.tokenizer), own or [*self.ids(text), *self._end(lesson.prompt)]
        before = self._until(answer, reason) if reason else 0
        return Example.of_answer(prompt, answer, _weights(before, len(answer), share), asked)

    def _until(self, ids: Sequence[int], characters: int) -> int:
        """How many tokens spell so many characters, one that goes beyond them not counted."""

        def spelled(count: int) -> int:
            return len(str(self.tokenizer.decode(list(ids[:count]), skip_special_tokens=True)))

        return bisect_right(range(1, len(ids) + 1), characters, key=spelled)

    def _end(self, prompt: Prompt) -> list[int]:
        """What ends an answer: in a chat the token that its template puts there, else that of a text."""
        end = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if prompt.is_raw or not self.tokenizer.chat_template:
            return end
        asked = prompt.messages or (Message("user", prompt.text or ""),)
        opened = prompts.render(asked, self.tokenizer, prompt.where, is_open=True)
        whole = prompts.render((*asked, Message("assistant", "x")), self.tokenizer, prompt.where, is_open=False)
        if not whole.startswith(f"{opened}x"):
            return end
        closing = self.ids(whole[len(opened) + 1 :])
        return closing[:1] if closing and closing[0] in self.ends else end


def _weights(reason: int, total: int, share: float | None) -> list[float]:
    """One for each token of an answer, of which the first `reason` are why; their mean is 1."""
    if share is None or not 0 < reason < total:
        return [1.0] * total
    return [share * total / reason] * reason + [(1 - share) * total / (total - reason)] * (total - reason)
